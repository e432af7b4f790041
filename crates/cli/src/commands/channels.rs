//! `polymq channels`, `peek`, `purge` and `delete`: what waits where, and taking it away.

use polymq::{BusBuilder, Error, ErrorKind, Listed, Stats};
use serde_json::{Value, json};

use super::connect;
use crate::{
    args::{Channels, Delete, Peek, Purge, address},
    exit::{Exit, Failed},
    output::{self, Output},
};

pub(crate) async fn list(builder: BusBuilder, options: Channels, output: &Output) -> Result<Exit, Failed> {
    let bus = connect(builder, output).await?;
    let listed = if options.names.is_empty() {
        bus.list().await.map_err(|error| match error.kind() {
            ErrorKind::Unsupported => error.with_hint("name the channels: polymq channels NAME..."),
            _ => error,
        })?
    } else {
        let mut counted = Vec::new();
        for name in &options.names {
            let address = address(name, options.topic);
            let stats = bus.channel(address.clone()).stats(options.group.as_deref()).await?;
            counted.push(Listed { address, group: options.group.clone(), stats: Some(stats) });
        }
        counted
    };
    for channel in &listed {
        output.say(|| line(channel), || object(channel))?;
    }
    if listed.is_empty() {
        output.note("there are no channels");
    }
    bus.close().await?;
    Ok(Exit::Done)
}

fn line(listed: &Listed) -> String {
    let name = match &listed.group {
        Some(group) => format!("{}@{group}", listed.address),
        None => listed.address.to_string(),
    };
    match listed.stats {
        Some(Stats { ready, unsettled, consumers }) => {
            let unsettled = unsettled.map_or_else(|| "-".to_owned(), |count| count.to_string());
            format!("{name}  ready {ready}  unsettled {unsettled}  consumers {consumers}")
        }
        None => name,
    }
}

fn object(listed: &Listed) -> Value {
    json!({
        "kind": listed.address.kind().to_string(),
        "name": listed.address.name(),
        "group": listed.group,
        "stats": listed.stats,
    })
}

pub(crate) async fn peek(builder: BusBuilder, options: Peek, output: &Output) -> Result<Exit, Failed> {
    let bus = connect(builder, output).await?;
    let channel = bus.channel(address(&options.channel, options.topic));
    let seen =
        channel.peek(options.group.as_deref(), options.max as usize).await.map_err(|error| match error.kind() {
            ErrorKind::Unsupported => {
                error.with_hint("take the messages and return them: polymq consume NAME --max N --keep")
            }
            _ => error,
        })?;
    for message in &seen {
        if output.is_json() {
            output.line(output::message(message).to_string())?;
        } else {
            output.line(message.payload())?;
        }
    }
    bus.close().await?;
    if seen.is_empty() {
        return Err(Failed::new(Exit::NoMessage, format!("no message waits in {}", channel.address())));
    }
    Ok(Exit::Done)
}

pub(crate) async fn purge(builder: BusBuilder, options: Purge, output: &Output) -> Result<Exit, Failed> {
    let bus = connect(builder, output).await?;
    let count = bus.queue(options.queue.as_str()).purge().await?;
    output.say(
        || format!("{count} messages of queue {} are gone", options.queue),
        || json!({ "purged": count, "channel": options.queue }),
    )?;
    bus.close().await?;
    Ok(Exit::Done)
}

pub(crate) async fn delete(builder: BusBuilder, options: Delete, output: &Output) -> Result<Exit, Failed> {
    let bus = connect(builder, output).await?;
    let channel = bus.channel(address(&options.channel, options.topic));
    let group = options.group.as_deref();
    // Deleting what is not there is harmless; a script wants to know that it was a wrong name.
    match channel.exists(group).await {
        Ok(true) => {}
        Ok(false) => {
            let missing = Error::new(ErrorKind::NotFound, format!("the {} does not exist", channel.address().kind()));
            return Err(missing.with_backend(bus.backend()).with_channel(channel.address().name()).into());
        }
        Err(error) if error.kind() == ErrorKind::Unsupported => {}
        Err(error) => return Err(error.into()),
    }
    channel.delete(group).await?;
    let of = group.map(|group| format!("group {group} of ")).unwrap_or_default();
    output.say(
        || format!("deleted {of}{}", channel.address()),
        || json!({ "deleted": channel.address().name(), "kind": channel.address().kind().to_string(), "group": group }),
    )?;
    bus.close().await?;
    Ok(Exit::Done)
}
