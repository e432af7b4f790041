#![doc = include_str!("../README.md")]

mod accept;
mod bindings;
mod content_type;
mod custom;
mod depth;
mod detail;
mod entry;
mod error;
mod format;
mod json;
mod limits;
mod message_pack;
mod raw;
mod registry;
mod registry_error;
mod resolve;
mod scratch;
mod serializer;
mod shape;
mod suggest;
mod text;

pub use accept::Accept;
pub use entry::SerializerEntry;
pub use error::{DecodeError, SerializeError};
pub use format::Format;
pub use limits::Limits;
pub use registry::Serializers;
pub use registry_error::RegistryError;
pub use serializer::{BoxError, FIRST_CUSTOM_ID, Serializer};

/// The `erased_serde` that [`Serializer`] speaks, so that a serializer's crate needs no version of its own.
pub use erased_serde;
/// The `inventory` that [`register!`] expands to; [`inventory::submit!`] works by hand too.
pub use inventory;
