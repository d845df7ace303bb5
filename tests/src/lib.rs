//! The guest laboratory and the worker that the end-to-end tests and the demo share.

pub mod bench;
pub mod fleet;
pub mod lab;
pub mod pretend;
pub mod proxy;
pub mod servers;
pub mod tracer;
pub mod worker;
