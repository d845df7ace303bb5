//! The command lines: `reap-pack` ([`pack`]) and `reapd` ([`daemon`]).

pub mod daemon;
pub mod output;
pub mod pack;
