//! `polymq consume`: prints messages; what was printed is acknowledged.

use std::time::Duration;

use polymq::{BusBuilder, ConsumeOptions, Delivery, Error};

use super::{connect, interrupted};
use crate::{
    args::{Consume, address},
    exit::{Exit, Failed},
    output::{self, Output},
};

/// Without --timeout: as good as for ever.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

pub(crate) async fn run(builder: BusBuilder, options: Consume, output: &Output) -> Result<Exit, Failed> {
    let bus = connect(builder, output).await?;
    let max = options.max.map_or(usize::MAX, |max| max as usize);
    let consume = ConsumeOptions {
        group: options.group.clone(),
        // Nothing is taken from other consumers that is not wanted; what is kept counts until the end.
        prefetch: if options.keep { max } else { max.min(64) },
        declare: !options.existing,
        ..ConsumeOptions::default()
    };
    let mut subscription = bus.channel(address(&options.channel, options.topic)).subscribe(consume).await?;
    let wait = options.timeout.unwrap_or(FOR_EVER);
    let (mut printed, mut kept) = (0, Vec::new());
    let stop = interrupted();
    tokio::pin!(stop);
    let outcome: Result<bool, Failed> = async {
        while printed < max {
            let received = tokio::select! {
                biased;
                () = &mut stop => return Ok(true),
                received = subscription.receive((max - printed).min(64), wait) => received?,
            };
            if received.is_empty() {
                return Ok(false);
            }
            for delivery in received {
                print(&delivery, output)?;
                printed += 1;
                if options.keep {
                    kept.push(delivery);
                } else {
                    delivery.ack().await.map_err(Error::from)?;
                }
            }
        }
        Ok(true)
    }
    .await;
    // Dropping a delivery returns it to the broker.
    drop(kept);
    let closed = subscription.close().await;
    let closed = closed.and(bus.close().await);
    let ended_well = outcome?;
    closed?;
    if printed == 0 && !ended_well {
        return Err(Failed::new(
            Exit::NoMessage,
            format!("no message came within {}", humantime::format_duration(wait)),
        ));
    }
    Ok(Exit::Done)
}

fn print(delivery: &Delivery, output: &Output) -> std::io::Result<()> {
    if output.is_json() {
        output.line(output::delivery(delivery).to_string())
    } else {
        output.line(delivery.message().payload())
    }
}
