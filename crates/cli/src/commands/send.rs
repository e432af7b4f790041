//! `polymq send`: sends messages and waits until the broker has accepted them.

use std::{io::Read, path::Path};

use polymq::{BusBuilder, Message};
use serde_json::json;

use super::connect;
use crate::{
    args::{Send, address},
    exit::{Exit, Failed},
    output::Output,
};

pub(crate) async fn run(builder: BusBuilder, options: Send, output: &Output) -> Result<Exit, Failed> {
    // A body that cannot be read is found before anything is connected.
    let messages = messages(&options)?;
    let bus = connect(builder, output).await?;
    let address = address(&options.channel, options.topic);
    let mut channel = bus.channel(address.clone());
    if options.existing {
        channel = channel.existing();
    }
    let count = messages.len();
    let results = channel.send_all(messages).await;
    // Nobody may read what was sent: what was not is told all the same.
    let (mut failed, mut said) = (Vec::new(), Ok(()));
    for result in results {
        match result {
            Ok(receipt) if said.is_ok() => said = output.say(
                || format!("sent {} to {address}", receipt.id),
                || json!({ "sent": receipt.id.to_string(), "channel": address.name(), "broker_id": receipt.broker_id }),
            ),
            Ok(_) => {}
            Err(error) => failed.push(error),
        }
    }
    let closed = bus.close().await;
    let not_sent = failed.len();
    match failed.into_iter().next() {
        None => {
            closed?;
            said?;
            Ok(Exit::Done)
        }
        Some(error) if count == 1 => Err(error.into()),
        Some(error) => {
            let sentence = format!("{not_sent} of {count} messages were not sent; the first: {error}");
            Err(Failed::new(Exit::of(&error), sentence))
        }
    }
}

/// What is to be sent.
fn messages(options: &Send) -> Result<Vec<Message>, Failed> {
    if let Some(path) = &options.lines {
        let text = read(path)?;
        let lines = text.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        return Ok(lines.filter(|line| !line.is_empty()).map(|line| message(options, line.to_vec())).collect());
    }
    let body = match (&options.file, options.body.as_deref()) {
        (Some(path), _) => read(path)?,
        (None, Some("-")) => {
            let mut body = Vec::new();
            std::io::stdin()
                .lock()
                .read_to_end(&mut body)
                .map_err(|error| Failed::new(Exit::Failed, format!("stdin cannot be read: {error}")))?;
            body
        }
        (None, body) => body.unwrap_or_default().as_bytes().to_vec(),
    };
    let message = message(options, body);
    Ok(vec![message; options.count as usize])
}

fn read(path: &Path) -> Result<Vec<u8>, Failed> {
    std::fs::read(path).map_err(|error| Failed::new(Exit::Usage, format!("{} cannot be read: {error}", path.display())))
}

fn message(options: &Send, body: Vec<u8>) -> Message {
    let content_type = match &options.content_type {
        Some(given) => given.clone(),
        None => looks_like(&body).to_owned(),
    };
    let mut message = Message::new(body).with_content_type(content_type);
    for (name, value) in &options.header {
        message = message.with_header(name.clone(), value.clone());
    }
    if let Some(kind) = &options.kind {
        message = message.with_kind(kind.clone());
    }
    if let Some(version) = options.kind_version {
        message = message.with_version(version);
    }
    if let Some(key) = &options.key {
        message = message.with_key(key.clone());
    }
    if let Some(id) = &options.id {
        message = message.with_id(id.as_str());
    }
    if let Some(delay) = options.delay {
        message = message.deliver_in(delay);
    }
    if let Some(ttl) = options.expires {
        message = message.expires_in(ttl);
    }
    message
}

/// The media type that a body looks like.
fn looks_like(body: &[u8]) -> &'static str {
    if serde_json::from_slice::<serde_json::Value>(body).is_ok() {
        "application/json"
    } else if std::str::from_utf8(body).is_ok() {
        "text/plain; charset=utf-8"
    } else {
        "application/octet-stream"
    }
}

#[cfg(test)]
mod tests {
    use super::looks_like;

    #[test]
    fn media_types() {
        for (body, expected) in [
            (&b"{\"id\":1}"[..], "application/json"),
            (b"17", "application/json"),
            (b"hello", "text/plain; charset=utf-8"),
            (b"", "text/plain; charset=utf-8"),
            (b"\xff\x00", "application/octet-stream"),
        ] {
            assert_eq!(looks_like(body), expected, "{body:?}");
        }
    }
}
