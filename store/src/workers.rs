//! A bounded pool of threads for reading, decoding and compressing, where demand goes first.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use crate::Urgency;

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
        let shared = Arc::new(Shared {
            queues: Mutex::default(),
            any: Condvar::new(),
            demand: Condvar::new(),
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

    /// Runs `job` soon. Never waits.
    pub(crate) fn submit(&self, urgency: Urgency, job: impl FnOnce() + Send + 'static) {
        let mut queues = self.shared.queues.lock();
        match urgency {
            Urgency::Demand => {
                queues.demand.push_back(Box::new(job));
                self.shared.demand.notify_one();
            }
            Urgency::Prefetch => queues.prefetch.push_back(Box::new(job)),
        }
        drop(queues);
        self.shared.any.notify_one();
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
            let condition = if demand_only { &shared.demand } else { &shared.any };
            condition.wait(&mut queues);
            continue;
        };
        drop(queues);
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
