//! What a signature covers, as bytes, and how it is written.

use std::time::SystemTime;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use polymq_core::{Message, SENDER_CLIENT, SENDER_COMPONENT, SENDER_VERSION};
use ring::digest::{SHA256, digest};

/// The header that carries the signature: `ed25519.KEY.SIGNATURE`.
pub const SIGNATURE: &str = "signature";
const ALGORITHM: &str = "ed25519";
/// Signatures for anything else with the same key are none of ours.
const DOMAIN: &[u8] = b"polymq signed message 1";

/// A signature as the header has it.
pub(crate) struct Signature<'a> {
    pub(crate) key: &'a str,
    pub(crate) bytes: Vec<u8>,
}

impl<'a> Signature<'a> {
    /// `None`: this is none.
    pub(crate) fn read(header: &'a str) -> Option<Self> {
        let (key, text) = header.strip_prefix(ALGORITHM)?.strip_prefix('.')?.split_once('.')?;
        Some(Self { key, bytes: BASE64_URL_SAFE_NO_PAD.decode(text).ok()? })
    }
}

pub(crate) fn write(key: &str, signature: &[u8]) -> String {
    format!("{ALGORITHM}.{key}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

/// Milliseconds since 1970, which every broker carries.
pub(crate) fn millis(time: SystemTime) -> u128 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis()
}

/// Everything that must not change on the way. Each part is written with its length, so that no two messages are
/// the same text.
pub(crate) fn text(message: &Message, destination: &str) -> Vec<u8> {
    let mut text = Vec::with_capacity(512);
    let mut part = |bytes: Option<&[u8]>| match bytes {
        None => text.push(0),
        Some(bytes) => {
            text.push(1);
            text.extend((bytes.len() as u64).to_be_bytes());
            text.extend(bytes);
        }
    };
    part(Some(DOMAIN));
    part(Some(destination.as_bytes()));
    part(message.id().map(ToString::to_string).as_deref().map(str::as_bytes));
    part(message.time().map(|time| millis(time).to_be_bytes()).as_ref().map(<[u8; 16]>::as_slice));
    part(message.version().map(u32::to_be_bytes).as_ref().map(<[u8; 4]>::as_slice));
    for text in [message.content_type(), message.kind(), message.key(), message.correlation_id(), message.reply_to()] {
        part(text.map(str::as_bytes));
    }
    // Brokers keep headers, not their order.
    let mut headers: Vec<_> = message.headers().iter().filter(|(name, _)| is_signed(name)).collect();
    headers.sort_unstable();
    part(Some(&(headers.len() as u64).to_be_bytes()));
    for (name, value) in headers {
        part(Some(name.as_bytes()));
        part(Some(value.as_bytes()));
    }
    part(Some(digest(&SHA256, message.payload()).as_ref()));
    text
}

/// Whoever passes a message on writes itself into it as the sender.
fn is_signed(name: &str) -> bool {
    !matches!(name, SIGNATURE | SENDER_COMPONENT | SENDER_VERSION | SENDER_CLIENT)
}
