//! What a snapshot depends on: the machine that it was packed on.

use crate::format::manifest::HostFacts;

/// This machine.
pub fn host_facts() -> HostFacts {
    let uname = rustix::system::uname();
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut facts = HostFacts {
        architecture: uname.machine().to_string_lossy().into_owned(),
        kernel: uname.release().to_string_lossy().into_owned(),
        page_bytes: rustix::param::page_size() as u64,
        ..HostFacts::default()
    };
    for line in cpuinfo.lines().take_while(|line| !line.trim().is_empty()) {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim().to_owned();
        match key.trim() {
            "vendor_id" | "CPU implementer" => facts.cpu_vendor = value,
            "cpu family" | "CPU architecture" => facts.cpu_family = value,
            "model" | "CPU part" => facts.cpu_model = value,
            "model name" => facts.cpu_model_name = value,
            "flags" | "Features" => {
                facts.cpu_flags = value.split_whitespace().map(str::to_owned).collect();
                facts.cpu_flags.sort_unstable();
            }
            _ => {}
        }
    }
    facts
}

/// How `here` differs from `recorded` in what a guest can see, a line each; empty when it does not.
pub fn differences(recorded: &HostFacts, here: &HostFacts) -> Vec<String> {
    let mut lines = Vec::new();
    let mut compare = |what: &str, recorded: &str, here: &str| {
        if recorded != here {
            lines.push(format!("{what} was {recorded:?}, is {here:?}"));
        }
    };
    compare("architecture", &recorded.architecture, &here.architecture);
    compare("CPU vendor", &recorded.cpu_vendor, &here.cpu_vendor);
    compare("CPU family", &recorded.cpu_family, &here.cpu_family);
    compare("CPU model", &recorded.cpu_model, &here.cpu_model);
    let missing: Vec<&str> = recorded
        .cpu_flags
        .iter()
        .filter(|flag| here.cpu_flags.binary_search(flag).is_err())
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        lines.push(format!("CPU flags are missing here: {}", missing.join(" ")));
    }
    lines
}
