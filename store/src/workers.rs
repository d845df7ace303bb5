//! A bounded pool of threads for reading, decoding and compressing, where demand goes first.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::spare::Spares;
use crate::{Urgency, scheduling};

/// Added to the nice value of the threads that take any job, so that a long prefetch leaves the processors to those who
/// wait: other VMs, their fault thread, and the thread for demand.
const PRIORITY: i32 = 10;
/// A thread that had nothing to do for so long prepares memory for the next start.
const IDLE: Duration = Duration::from_millis(2);

type Job = Box<dyn FnOnce() + Send>;

/// The pool. Dropping it ends the threads; jobs that have not begun are dropped.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    queues: Mutex<Queues>,
    /// Threads that take any job.
    any: Condvar,
    /// The one thread that takes demand only, so that demand never waits for a long prefetch job.
    demand: Condvar,
    spares: Spares,
}

#[derive(Default)]
struct Queues {
    demand: VecDeque<Job>,
    prefetch: VecDeque<Job>,
    stopping: bool,
}

impl Workers {
    /// `threads` threads for everything, and one for demand alone.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        Self::start(threads, Spares::default())
    }

    /// The same on a node that serves VMs: with buffers for what is read and decoded, and with threads that
    /// give way to the VMs and to demand.
    pub(crate) fn for_vms(threads: usize) -> std::io::Result<Self> {
        Self::start(threads, Spares::kept())
    }

    fn start(threads: usize, spares: Spares) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            queues: Mutex::default(),
            any: Condvar::new(),
            demand: Condvar::new(),
            spares,
        });
        let mut workers = Self { shared: shared.clone(), threads: Vec::new() };
        for number in 0..=threads {
            let (shared, demand_only) = (shared.clone(), number == threads);
            let name =
                if demand_only { "decode-demand".into() } else { format!("decode-{number}") };
            let thread = std::thread::Builder::new().name(name);
            workers.threads.push(thread.spawn(move || work(&shared, demand_only))?);
        }
        Ok(workers)
    }

    /// Buffers for what is read and decoded; the threads see to it when they are idle.
    pub(crate) fn spares(&self) -> &Spares {
        &self.shared.spares
    }

    /// Runs `job` soon. Never waits.
    pub(crate) fn submit(&self, urgency: Urgency, job: impl FnOnce() + Send + 'static) {
        self.submit_all(urgency, std::iter::once(job));
    }

    /// Runs `jobs` soon, begun in their order. Never waits.
    pub(crate) fn submit_all<Work: FnOnce() + Send + 'static>(
        &self,
        urgency: Urgency,
        jobs: impl Iterator<Item = Work>,
    ) {
        let mut queues = self.shared.queues.lock();
        let queue = match urgency {
            Urgency::Demand => &mut queues.demand,
            Urgency::Prefetch => &mut queues.prefetch,
        };
        let before = queue.len();
        queue.extend(jobs.map(|job| Box::new(job) as Job));
        let added = queue.len() - before;
        drop(queues);
        if urgency == Urgency::Demand && added > 0 {
            self.shared.demand.notify_one();
        }
        // A thread that is awake takes the next job without being told.
        for _ in 0..added.min(self.threads.len()) {
            self.shared.any.notify_one();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let mut queues = self.shared.queues.lock();
        queues.stopping = true;
        let abandoned = (std::mem::take(&mut queues.demand), std::mem::take(&mut queues.prefetch));
        drop(queues);
        // Dropped outside the lock: a job may own what submits other jobs when it is dropped.
        drop(abandoned);
        self.shared.any.notify_all();
        self.shared.demand.notify_all();
        let this_thread = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last owner of the pool may be a job of its own.
            if thread.thread().id() != this_thread {
                thread.join().unwrap_or_default();
            }
        }
    }
}

fn work(shared: &Shared, demand_only: bool) {
    if shared.spares.are_kept()
        && !demand_only
        && let Err(error) = scheduling::give_way(PRIORITY)
    {
        tracing::warn!("a decode thread keeps its priority: {error}");
    }
    let mut has_spares = false;
    let mut queues = shared.queues.lock();
    loop {
        if queues.stopping {
            return;
        }
        let job = match queues.demand.pop_front() {
            None if !demand_only => queues.prefetch.pop_front(),
            job => job,
        };
        let Some(job) = job else {
            if demand_only {
                shared.demand.wait(&mut queues);
            } else if !has_spares {
                if shared.any.wait_for(&mut queues, IDLE).timed_out() {
                    has_spares = MutexGuard::unlocked(&mut queues, || !shared.spares.add_one());
                }
            } else {
                shared.any.wait(&mut queues);
            }
            continue;
        };
        drop(queues);
        has_spares = false;
        // A panic is our bug; it must not take a thread from every later job with it. Whoever
        // waits for this job learns of it because the job's captured state is dropped.
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            tracing::error!("a decode job panicked");
        }
        queues = shared.queues.lock();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn demand_overtakes_queued_prefetch() {
        let workers = Workers::new(1).expect("threads start");
        let (order, seen) = mpsc::channel();
        let (release, gate) = mpsc::channel::<()>();
        workers.submit(Urgency::Prefetch, move || gate.recv().expect("released"));
        for number in 0..3 {
            let order = order.clone();
            workers.submit(Urgency::Prefetch, move || order.send(number).expect("receiver"));
        }
        let demand_order = order.clone();
        workers.submit(Urgency::Demand, move || demand_order.send(100).expect("receiver"));
        assert_eq!(seen.recv().expect("a job ran"), 100, "demand has a thread of its own");
        release.send(()).expect("gate");
        assert_eq!((seen.recv(), seen.recv(), seen.recv()), (Ok(0), Ok(1), Ok(2)));
    }

    #[test]
    fn a_panicking_job_does_not_end_its_thread() {
        let workers = Workers::new(1).expect("threads start");
        workers.submit(Urgency::Prefetch, || panic!("on purpose"));
        let (sender, receiver) = mpsc::channel();
        workers.submit(Urgency::Prefetch, move || sender.send(1).expect("receiver"));
        assert_eq!(receiver.recv(), Ok(1));
    }
}
