//! The laboratory that the end-to-end tests and the demo share.

pub mod lab;
