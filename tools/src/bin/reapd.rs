//! The `reapd` program.

fn main() -> std::process::ExitCode {
    reap_tools::daemon::main()
}
