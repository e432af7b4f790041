#![doc = include_str!("../README.md")]

mod backend;
mod config;
mod engine;

pub use crate::{
    backend::EmbeddedBackend,
    config::{EmbeddedConfig, KEYS},
};

/// The name of this backend.
pub const NAME: &str = "embedded";

polymq_core::register_backend!(EmbeddedBackend);
