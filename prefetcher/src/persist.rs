//! A thread that many VMs depend on does not end by a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// A body that panics each time it runs must not take a core.
const PAUSE: Duration = Duration::from_millis(10);

/// Runs `body` until it returns. A panic is our bug: `repair` puts right what it may have left
/// behind, and `body` runs again.
pub(crate) fn persist(name: &str, mut body: impl FnMut(), mut repair: impl FnMut()) {
    while catch_unwind(AssertUnwindSafe(&mut body)).is_err() {
        tracing::error!("the thread '{name}' panicked; this is a bug");
        repair();
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_repaired_and_the_body_runs_again() {
        let (mut runs, mut repairs) = (0, 0);
        let body = || {
            runs += 1;
            assert!(runs > 2, "on purpose");
        };
        persist("test", body, || repairs += 1);
        assert_eq!((runs, repairs), (3, 2));
    }
}
