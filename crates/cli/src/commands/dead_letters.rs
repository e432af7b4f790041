//! `polymq dead-letters`: shows what was given up, or sends it back.

use std::time::Duration;

use polymq::{Address, Bus, BusBuilder, Channel, ConsumeOptions, Delivery, dead_letter, replay_dead_letters};
use serde_json::json;

use super::connect;
use crate::{
    args::{DeadLetters, DeadLettersOf, address},
    exit::{Exit, Failed},
    output::{self, Output},
};

/// How long one that waits may take to come: a member that joins a group of Kafka gets nothing for some seconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long nothing has to come where the broker does not say how many wait.
const QUIET: Duration = Duration::from_secs(3);

pub(crate) async fn run(builder: BusBuilder, options: DeadLetters, output: &Output) -> Result<Exit, Failed> {
    let bus = connect(builder, output).await?;
    match &options {
        DeadLetters::List { of, topic, group } => {
            list(&bus, &address(&of.channel, *topic), group.as_deref(), of, output).await?;
        }
        DeadLetters::Replay(of) => {
            let source = address(&of.channel, false);
            let (most, patience) = looks_for(&bus.channel(source.dead_letters(None)), &bus, of).await?;
            let count = if most == 0 { 0 } else { replay_dead_letters(&bus, &source, most, patience).await? };
            output.say(
                || format!("{count} sent back to {source}"),
                || json!({ "replayed": count, "channel": source.name() }),
            )?;
        }
    }
    bus.close().await?;
    Ok(Exit::Done)
}

/// How many are wanted, and how long each is waited for.
async fn looks_for(letters: &Channel, bus: &Bus, of: &DeadLettersOf) -> polymq::Result<(usize, Duration)> {
    let max = of.max as usize;
    Ok(match of.timeout {
        Some(timeout) => (max, timeout),
        None if bus.capabilities().stats => {
            let waiting = letters.stats(None).await?.ready;
            (max.min(usize::try_from(waiting).unwrap_or(max)), PATIENCE)
        }
        None => (max, QUIET),
    })
}

async fn list(
    bus: &Bus,
    source: &Address,
    group: Option<&str>,
    of: &DeadLettersOf,
    output: &Output,
) -> Result<(), Failed> {
    let channel = bus.channel(source.dead_letters(group));
    let (max, patience) = looks_for(&channel, bus, of).await?;
    if max == 0 {
        output.note(&format!("{source} has no dead letters"));
        return Ok(());
    }
    let options = ConsumeOptions { prefetch: max, declare: false, ..ConsumeOptions::default() };
    let mut letters = channel.subscribe(options).await?;
    let shown = async {
        let mut seen = Vec::new();
        while seen.len() < max {
            // Somebody else may have taken what was counted; only the first one has to wait for a group to be joined.
            let patience = if seen.is_empty() || of.timeout.is_some() { patience } else { QUIET };
            let received = letters.receive(max - seen.len(), patience).await?;
            if received.is_empty() {
                break;
            }
            let from = seen.len();
            seen.extend(received);
            seen[from..].iter().try_for_each(|letter| print(letter, output))?;
        }
        // Dropping a delivery returns it to the broker, also where nobody reads on.
        Ok::<usize, Failed>(seen.len())
    };
    let shown = shown.await;
    // The broker has heard of it when this returns.
    let closed = letters.close().await;
    if shown? == 0 {
        output.note(&format!("{source} has no dead letters"));
    }
    Ok(closed?)
}

fn print(letter: &Delivery, output: &Output) -> std::io::Result<()> {
    let known = |name| letter.message().system_headers().get(name).unwrap_or("-");
    output.say(
        || {
            let id = letter.message().id().map(ToString::to_string).unwrap_or_else(|| "-".into());
            let (at, attempts, reason) =
                (known(dead_letter::DEAD_AT), known(dead_letter::ATTEMPTS), known(dead_letter::REASON));
            format!("{id}  {at}  attempts {attempts}  {reason}")
        },
        || output::delivery(letter),
    )
}
