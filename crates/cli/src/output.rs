//! What is written to stdout: text for people, one JSON object a line for machines.

use std::io::{self, Write};

use polymq::{Delivery, Message};
use serde_json::{Value, json};

/// Stdout. A reader that goes away is an [`io::Error`], never a panic.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// One line, which the reader has when this returns.
    pub(crate) fn line(&self, text: impl AsRef<[u8]>) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_ref())?;
        out.write_all(b"\n")?;
        out.flush()
    }

    /// The text, or the object.
    pub(crate) fn say(&self, text: impl FnOnce() -> String, object: impl FnOnce() -> Value) -> io::Result<()> {
        self.line(if self.json { object().to_string() } else { text() })
    }

    /// For people only, beside the output.
    pub(crate) fn note(&self, text: &str) {
        if !self.json {
            // Only a remark: it may be lost.
            let _ = writeln!(io::stderr(), "note: {text}");
        }
    }
}

/// A delivery with everything that is known about it.
pub(crate) fn delivery(delivery: &Delivery) -> Value {
    let mut object = message(delivery.message());
    object["channel"] = json!(delivery.channel());
    object["attempt"] = json!(delivery.attempt());
    object
}

/// A message with everything that is known about it.
pub(crate) fn message(message: &Message) -> Value {
    let pairs = |headers: &polymq::Headers| -> Value {
        headers.iter().map(|(name, value)| (name.to_owned(), json!(value))).collect::<serde_json::Map<_, _>>().into()
    };
    let time = |time: std::time::SystemTime| humantime::format_rfc3339_millis(time).to_string();
    let mut object = json!({
        "id": message.id().map(ToString::to_string),
        "content_type": message.content_type(),
        "kind": message.kind(),
        "version": message.version(),
        "key": message.key(),
        "correlation_id": message.correlation_id(),
        "reply_to": message.reply_to(),
        "time": message.time().map(time),
        "expires_at": message.expires_at().map(time),
        "headers": pairs(message.headers()),
        "polymq": pairs(message.system_headers()),
    });
    if let Value::Object(fields) = &mut object {
        fields.retain(|_, value| !value.is_null() && value.as_object().is_none_or(|pairs| !pairs.is_empty()));
    }
    match std::str::from_utf8(message.payload()) {
        Ok(text) => object["body"] = json!(text),
        Err(_) => object["body_hex"] = json!(hex(message.payload())),
    }
    object
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
