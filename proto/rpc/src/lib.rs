//! nebd's negotiated protocols.
//!
//! [`admin`]: the gRPC API that `nebdctl` speaks. [`frame`]: the data-plane frame, a fixed
//! little-endian header with payload checksums, for storage that is reached over a socket.

pub mod frame;

/// Metadata key of the errno (a positive decimal number) beside the gRPC code of a failed call.
pub const ERRNO_METADATA: &str = "nebd-errno";

/// The admin API, generated from `proto/admin.proto`.
#[allow(missing_docs, clippy::all)]
pub mod admin {
    tonic::include_proto!("nebd.admin.v1");
}
