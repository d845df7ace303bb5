//! Waiting until a certain time, to some 0.1 ms: tokio's own timers fire one or two milliseconds late, which in three
//! rounds of 30 is more than what is to be measured.

use tokio::time::Instant;

/// Waits until `due`.
pub(super) async fn wait_until(due: Instant) {
    let rest = due.saturating_duration_since(Instant::now());
    if rest.is_zero() {
        return;
    }
    // The kernel wakes a sleeping thread on time.
    if tokio::task::spawn_blocking(move || std::thread::sleep(rest)).await.is_err() {
        tokio::time::sleep_until(due).await;
    }
}
