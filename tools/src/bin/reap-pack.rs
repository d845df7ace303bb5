//! The `reap-pack` program.

fn main() -> std::process::ExitCode {
    reap_tools::pack::main()
}
