#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod keys;
mod seen;
mod signed;
mod signer;
mod verifier;

pub use crate::{
    keys::{PublicKeys, SigningKey},
    signed::SIGNATURE,
    signer::Signer,
    verifier::Verifier,
};
