//! A harness that proves a block device survives the death and replacement of its server.
pub mod device;
pub mod memory;
pub mod oracle;
pub mod report;
pub mod stamp;
pub mod stream;
pub mod timeline;
pub mod workload;
