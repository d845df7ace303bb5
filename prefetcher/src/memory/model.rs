//! The model: guest memory in small, with a kernel that keeps the rules of userfaultfd and fails in every way
//! that it can. Proptest chooses the order of events; the code that is driven is the production code.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const UNITS: u64 = 24;
const BASE: u64 = 0x10_0000;
const PAGE: u64 = PAGE_SIZE as u64;
/// Where one mapping ends and the next begins: no ioctl reaches across.
const BORDER: u64 = 10;
/// Where the VMM has unmapped a page.
const UNMAPPED: u64 = 17;

/// What a page holds; `None` when it is missing.
type Page = Option<u8>;

/// What a page of the snapshot holds: every fifth is zeros.
fn truth(unit: u64) -> u8 {
    if unit.is_multiple_of(5) { 0 } else { 100 + u8::try_from(unit).expect("few units") }
}

/// What the next ioctl answers instead of what it would.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Injected {
    Again,
    /// After so many pages the mappings begin to change.
    Partly(u64),
    NoMemory,
    Failed,
    Gone,
}

#[derive(Default)]
struct State {
    pages: Vec<Page>,
    /// Events that nobody has read.
    unread: VecDeque<MemoryEvent>,
    /// Removals that were read; the guest's thread drops the pages a moment later.
    read_removals: Vec<(u64, u64)>,
    /// Pages that a removal was read for: snapshot bytes must never be put there again.
    removed: Vec<bool>,
    /// Threads that sleep, by unit.
    asleep: Vec<u32>,
    injected: VecDeque<Injected>,
    gone: bool,
    calls: u64,
    violation: Option<String>,
}

struct Simulated(Mutex<State>);

fn unit_of(address: u64) -> u64 {
    (address - BASE) / PAGE
}

impl State {
    fn install(&mut self, address: u64, bytes: &[u8]) -> Outcome {
        self.calls += 1;
        let (first, count) = (unit_of(address), bytes.len() as u64 / PAGE);
        let mut limit = count;
        match self.injected.pop_front() {
            Some(Injected::Gone) => self.gone = true,
            Some(Injected::NoMemory) => return Outcome::NoMemory,
            Some(Injected::Failed) => return Outcome::Failed(libc::EIO),
            Some(Injected::Again) => return Outcome::Again,
            Some(Injected::Partly(pages)) => limit = pages,
            None => {}
        }
        if self.gone {
            return Outcome::Gone;
        }
        if self.unread.iter().any(|event| matches!(event, MemoryEvent::Removed(..))) {
            return Outcome::Again;
        }
        let end = first + count;
        if (first < BORDER && end > BORDER) || (first..end).contains(&UNMAPPED) {
            return Outcome::NotMapped;
        }
        for unit in first..end {
            let done = unit - first;
            if self.pages[unit as usize].is_some() {
                return if done == 0 {
                    Outcome::AlreadyThere
                } else {
                    Outcome::Installed(done * PAGE)
                };
            }
            if done == limit {
                return if done == 0 { Outcome::Again } else { Outcome::Installed(done * PAGE) };
            }
            let byte = bytes[(done * PAGE) as usize];
            if self.removed[unit as usize] && byte != 0 {
                self.violation = Some(format!("unit {unit} got bytes after it was removed"));
            }
            if !self.removed[unit as usize] && byte != truth(unit) {
                self.violation = Some(format!("unit {unit} got the bytes of another"));
            }
            self.pages[unit as usize] = Some(byte);
            self.asleep[unit as usize] = 0;
        }
        Outcome::Installed(count * PAGE)
    }

    fn touch(&mut self, unit: u64) {
        if self.pages[unit as usize].is_none() && unit != UNMAPPED {
            self.unread.push_back(MemoryEvent::Fault(BASE + unit * PAGE));
            self.asleep[unit as usize] += 1;
        }
    }

    fn drop_removed(&mut self) {
        for (first, count) in std::mem::take(&mut self.read_removals) {
            for unit in first..first + count {
                self.pages[unit as usize] = None;
            }
        }
    }

    /// Up to `limit` events; a removal that is read counts from here on.
    fn read(&mut self, limit: usize) -> Vec<MemoryEvent> {
        let count = limit.min(self.unread.len());
        let events: Vec<_> = self.unread.drain(..count).collect();
        for event in &events {
            if let MemoryEvent::Removed(start, end) = event {
                let (first, count) = (unit_of(*start), (end - start) / PAGE);
                self.read_removals.push((first, count));
                (first..first + count).for_each(|unit| self.removed[unit as usize] = true);
            }
        }
        events
    }
}

impl Kernel for Simulated {
    fn copy(&self, address: u64, bytes: &[u8]) -> Outcome {
        self.0.lock().install(address, bytes)
    }

    fn zero(&self, address: u64, bytes: u64) -> Outcome {
        self.0.lock().install(address, &vec![0; bytes as usize])
    }

    fn wake(&self, address: u64, _bytes: u64) -> io::Result<()> {
        let mut state = self.0.lock();
        let unit = unit_of(address);
        // Who finds the page missing faults again.
        let woken = std::mem::take(&mut state.asleep[unit as usize]);
        (0..woken).for_each(|_| state.touch(unit));
        Ok(())
    }
}

/// The engine in small: what `fault.rs` does, one step at a time.
struct Driver {
    memory: GuestMemory<Simulated>,
    in_flight: Vec<u64>,
    killed: bool,
}

impl Driver {
    fn new() -> Self {
        let layout = Layout::new([(BASE, UNITS * PAGE, 0)].into_iter(), PAGE, UNITS * PAGE);
        let units = UNITS as usize;
        let state = State {
            pages: vec![None; units],
            removed: vec![false; units],
            asleep: vec![0; units],
            ..State::default()
        };
        let memory = GuestMemory::new(layout, Simulated(Mutex::new(state)));
        Self { memory, in_flight: Vec::new(), killed: false }
    }

    fn kernel(&self) -> parking_lot::MutexGuard<'_, State> {
        self.memory.kernel.0.lock()
    }

    fn settle(&mut self, unit: u64, fault: PendingFault, content: Content<'_>) {
        match self.memory.serve(unit, fault, content) {
            Served::Done | Served::Again | Served::Gone => {}
            Served::Failed(..) => self.killed = true,
        }
    }

    fn attend(&mut self, unit: u64, fault: PendingFault, cached: bool) {
        let bytes = vec![truth(unit); PAGE_SIZE];
        match fault.class {
            FaultClass::Removed | FaultClass::Zero => self.settle(unit, fault, Content::Zero),
            _ if cached => self.settle(unit, fault, Content::Bytes(&bytes)),
            _ => {
                self.memory.await_bytes(unit, fault);
                self.in_flight.push(unit);
            }
        }
    }

    fn read_events(&mut self, limit: usize, cached: bool) {
        let read = |events: &mut Vec<MemoryEvent>| {
            events.extend(self.memory.kernel.0.lock().read(limit));
            Ok(false)
        };
        let (events, _) = self.memory.read_events(read).expect("reads");
        for event in events {
            let MemoryEvent::Fault(address) = event else { continue };
            let unit = unit_of(address);
            match self.memory.fault(unit, || truth(unit) == 0) {
                NewFault::Serve(fault) => self.attend(unit, fault, cached),
                NewFault::Waits => {}
                NewFault::TooMany => self.killed = true,
            }
        }
        self.retry(cached);
    }

    fn retry(&mut self, cached: bool) {
        for (unit, fault) in self.memory.take_retries() {
            self.attend(unit, fault, cached);
        }
    }

    fn arrive(&mut self, number: usize, good: bool) {
        if self.in_flight.is_empty() {
            return;
        }
        let unit = self.in_flight.swap_remove(number % self.in_flight.len());
        let Some(fault) = self.memory.bytes_came(unit) else { return };
        let bytes = vec![truth(unit); PAGE_SIZE];
        match good {
            true => self.settle(unit, fault, Content::Bytes(&bytes)),
            false if self.memory.is_removed(unit) => self.settle(unit, fault, Content::Zero),
            false => self.killed = true,
        }
    }

    /// Installs ahead; `helped` when the fault thread reads events while it pauses.
    fn ahead(&self, first: u64, count: u64, helped: bool) -> Ahead {
        let bytes: Vec<u8> =
            (first..first + count).flat_map(|unit| vec![truth(unit); PAGE_SIZE]).collect();
        let zeros = count == 1 && truth(first) == 0;
        self.memory.install_ahead(first, count, (!zeros).then_some(&bytes[..]), || {
            if helped {
                // Removals are marked; the faults among the events stay where they are.
                let mut faults = VecDeque::new();
                let read = |events: &mut Vec<MemoryEvent>| {
                    events.extend(self.memory.kernel.0.lock().read(usize::MAX));
                    Ok(false)
                };
                let (events, _) = self.memory.read_events(read).expect("reads");
                faults.extend(events.into_iter().filter(|e| matches!(e, MemoryEvent::Fault(_))));
                self.memory.kernel.0.lock().unread.extend(faults);
            }
            true
        })
    }

    fn step(&mut self, kind: u8, a: u64, b: u64, coin: bool) {
        let (first, count) = (a % UNITS, 1 + b % (UNITS - a % UNITS).min(12));
        match kind {
            0 => self.kernel().touch(first),
            1 => {
                let (start, end) = (BASE + first * PAGE, BASE + (first + count) * PAGE);
                self.kernel().unread.push_back(MemoryEvent::Removed(start, end));
            }
            2 => self.read_events(1 + (b % 4) as usize, coin),
            3 => self.retry(coin),
            4 => self.arrive(a as usize, !b.is_multiple_of(8)),
            5 => {
                let before = self.kernel().calls;
                self.ahead(first, count, coin);
                let calls = self.kernel().calls - before;
                // A border costs a handful of tries for each page at most.
                let most = 6 * count + u64::from(AGAIN_TRIES) + 1;
                if calls > most {
                    self.kernel().violation = Some(format!("{calls} ioctls for {count} units"));
                }
            }
            6 => self.kernel().drop_removed(),
            7 => {
                // Somebody else was first: a helper of the VMM, or a write before we looked.
                let removed = self.kernel().removed[first as usize];
                let page = Some(if removed { 0 } else { truth(first) });
                let mut kernel = self.kernel();
                if first != UNMAPPED && kernel.pages[first as usize].is_none() {
                    kernel.pages[first as usize] = page;
                }
            }
            _ => {
                let what = match b % 12 {
                    0 => Injected::NoMemory,
                    1 => Injected::Failed,
                    2 => Injected::Gone,
                    3..=6 => Injected::Again,
                    more => Injected::Partly(more - 7),
                };
                self.kernel().injected.push_back(what);
            }
        }
    }

    fn over(&self) -> bool {
        self.killed || self.kernel().gone
    }

    /// What must hold after every step.
    fn check(&self) -> Result<(), TestCaseError> {
        let kernel = self.kernel();
        prop_assert!(kernel.violation.is_none(), "{:?}", kernel.violation);
        if self.killed || kernel.gone {
            return Ok(());
        }
        for unit in 0..UNITS {
            let address = BASE + unit * PAGE;
            let unread = kernel.unread.contains(&MemoryEvent::Fault(address));
            let pending = self.memory.pending.lock().contains(unit);
            let there = kernel.pages[unit as usize].is_some();
            let sleeps = kernel.asleep[unit as usize] > 0;
            prop_assert!(!sleeps || unread || pending, "unit {unit} is forgotten");
            let installed = !self.memory.is_wanted(unit) && !self.memory.is_removed(unit);
            prop_assert!(!installed || there, "unit {unit} is not there, and counts as installed");
        }
        let retries = self.memory.pending.lock().len();
        prop_assert!(retries >= self.in_flight.len(), "a fetch without its fault");
        Ok(())
    }

    /// From here on nothing fails: everybody must wake, in few rounds.
    fn calm(&mut self) -> Result<(), TestCaseError> {
        self.kernel().injected.clear();
        for _ in 0..64 {
            self.read_events(usize::MAX, true);
            self.kernel().drop_removed();
            while !self.in_flight.is_empty() {
                self.arrive(0, true);
            }
            self.check()?;
        }
        for unit in 0..UNITS {
            prop_assert_eq!(
                self.kernel().asleep[unit as usize],
                0,
                "unit {} sleeps for ever",
                unit
            );
        }
        prop_assert_eq!(self.memory.pending.lock().len(), 0);
        Ok(())
    }

    /// Everything is installed: what is missing then reads as zeros, and may only be what was removed.
    fn hand_over(&mut self) -> Result<(), TestCaseError> {
        for unit in 0..UNITS {
            let ahead = self.ahead(unit, 1, true);
            let fine = matches!(ahead.left, None | Some(Outcome::NotMapped));
            prop_assert!(fine, "unit {}: {:?}", unit, ahead);
        }
        let kernel = self.kernel();
        for unit in (0..UNITS).filter(|unit| *unit != UNMAPPED) {
            let read = kernel.pages[unit as usize].unwrap_or(0);
            let expected = if kernel.removed[unit as usize] { 0 } else { truth(unit) };
            prop_assert_eq!(read, expected, "unit {} after the hand-over", unit);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_order_of_events_and_no_answer_loses_a_fault_or_revives_a_page(
        steps in prop::collection::vec((0..10u8, 0..UNITS, 0..48u64, any::<bool>()), 0..120)
    ) {
        let mut driver = Driver::new();
        for (kind, a, b, coin) in steps {
            driver.step(kind, a, b, coin);
            driver.check()?;
            if driver.over() {
                return Ok(());
            }
        }
        driver.calm()?;
        driver.hand_over()?;
    }
}
