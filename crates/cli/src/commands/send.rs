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
    let (numbers, messages): (Vec<usize>, Vec<Message>) = messages(&options)?.into_iter().unzip();
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
    for (number, result) in numbers.into_iter().zip(results) {
        match result {
            Ok(receipt) if said.is_ok() => said = output.say(
                || format!("sent {} to {address}", receipt.id),
                || json!({ "sent": receipt.id.to_string(), "channel": address.name(), "broker_id": receipt.broker_id }),
            ),
            Ok(_) => {}
            Err(error) => failed.push((number, error)),
        }
    }
    let closed = bus.close().await;
    let (not_sent, numbers) = (failed.len(), ranges(failed.iter().map(|(number, _)| *number)));
    match failed.into_iter().map(|(_, error)| error).next() {
        None => {
            closed?;
            said?;
            Ok(Exit::Done)
        }
        Some(error) if count == 1 => Err(error.into()),
        Some(error) => {
            let what = if options.lines.is_some() { "line" } else { "message" };
            let sentence =
                format!("{not_sent} of {count} messages were not sent ({what} {numbers}); the first: {error}");
            Err(Failed::new(Exit::of(&error), sentence))
        }
    }
}

/// What is to be sent, each with its line, or with its number where it is of no file of lines.
fn messages(options: &Send) -> Result<Vec<(usize, Message)>, Failed> {
    if let Some(path) = &options.lines {
        let text = read(path)?;
        let lines = text.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        let lines = (1..).zip(lines).filter(|(_, line)| !line.is_empty());
        return Ok(lines.map(|(number, line)| (number, message(options, line.to_vec()))).collect());
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
    Ok((1..=options.count as usize).map(|number| (number, message.clone())).collect())
}

/// Ascending numbers for people: "2, 5-7".
fn ranges(numbers: impl Iterator<Item = usize>) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    let texts = ranges.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    texts.collect::<Vec<_>>().join(", ")
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
    use super::{looks_like, ranges};

    #[test]
    fn numbers_that_follow_each_other_are_a_range() {
        assert_eq!(ranges([2, 5, 6, 7, 9].into_iter()), "2, 5-7, 9");
        assert_eq!(ranges([].into_iter()), "");
    }

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
