//! The KubeMQ gRPC interface: messages, the client's stub and the server's trait.
//!
//! `src/generated.rs` is made from `proto/kubemq.proto` and committed, so nobody needs `protoc`; the test
//! `generated_code_is_up_to_date` compares the two, and writes the file when `UPDATE_GENERATED` is set.

#[rustfmt::skip] // as the generator wrote it: a test compares
mod generated;

pub use generated::*;
