//! `polymq dead-letters`: shows what was given up, or sends it back.

use polymq::{Address, Bus, BusBuilder, ConsumeOptions, Delivery, dead_letter, replay_dead_letters};
use serde_json::json;

use super::connect;
use crate::{
    args::{DeadLetters, DeadLettersOf, address},
    exit::{Exit, Failed},
    output::{self, Output},
};

pub(crate) async fn run(builder: BusBuilder, options: DeadLetters, output: &Output) -> Result<Exit, Failed> {
    let bus = connect(builder, output).await?;
    let (DeadLetters::List(of) | DeadLetters::Replay(of)) = &options;
    let source = address(&of.channel, of.topic);
    let exit = match &options {
        DeadLetters::List(of) => list(&bus, &source, of, output).await?,
        DeadLetters::Replay(of) => {
            let count = replay_dead_letters(&bus, &source, of.max as usize, of.timeout).await?;
            output.say(
                || format!("{count} sent back to {source}"),
                || json!({ "replayed": count, "channel": source.name() }),
            )?;
            Exit::Done
        }
    };
    bus.close().await?;
    Ok(exit)
}

async fn list(bus: &Bus, source: &Address, of: &DeadLettersOf, output: &Output) -> Result<Exit, Failed> {
    let max = of.max as usize;
    let options = ConsumeOptions { prefetch: max, declare: false, ..ConsumeOptions::default() };
    let mut letters = bus.channel(source.dead_letters(of.group.as_deref())).subscribe(options).await?;
    let mut seen = Vec::new();
    while seen.len() < max {
        let received = letters.receive(max - seen.len(), of.timeout).await?;
        if received.is_empty() {
            break;
        }
        for letter in received {
            print(&letter, output)?;
            seen.push(letter);
        }
    }
    let count = seen.len();
    // Dropping a delivery returns it to the broker.
    drop(seen);
    letters.close().await?;
    if count == 0 {
        output.note(&format!("{source} has no dead letters"));
    }
    Ok(Exit::Done)
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
