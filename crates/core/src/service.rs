//! A whole service: connect, run every linked consumer beside the program's own main, stop in order.

use std::{future::Future, pin::Pin};

use crate::{
    Bus, ConsumerFactory, ConsumerRunner, Environment, Failure,
    runner::{CANCEL_GRACE, Signals, Unheld, nobody_listens, somebody_listens},
};

/// Where the service serves health and metrics, when it is set.
pub const BIND_VARIABLE: &str = "POLYMQ_BIND";

/// Runs a program: connects to what the environment chooses, starts every `#[consumer]` function that is linked,
/// then calls `main`. When `main` returns `Ok`, the consumers go on until SIGINT or SIGTERM and are drained; without
/// any consumer the program ends. A signal before the consumers have started ends the program, without a call of `main`. One while `main` still runs drains the consumers beside it, then drops it and waits
/// for the answers to what was sent. Where `main` waits in [`ConsumerRunner::run`] or [`Running::until_signal`](crate::Running::until_signal),
/// which the signal ends too, it is dropped only when it has not returned 5 seconds after that.
///
/// # Errors
/// The first of: connecting, starting the consumers, `main` itself, stopping. An error of `main` stops the consumers.
pub async fn run_service<F, Fut>(main: F) -> Result<(), Failure>
where
    F: FnOnce(Bus) -> Fut,
    Fut: Future<Output = Result<(), Failure>>,
{
    let bus = Bus::from_env().await?;
    let consumers = ConsumerFactory::linked(&bus);
    // From the first moment on, so that neither a handler nor a main that does not return is cut off.
    let mut signals = Signals::new()?;
    let outcome = if consumers.addresses().is_empty() {
        let main = main(bus.clone());
        tokio::pin!(main);
        tokio::select! {
            biased;
            outcome = &mut main => outcome,
            () = signals.next() => {
                tracing::info!("stopping; a second signal waits for nothing");
                let ended = ends(main).await;
                let flushed = tokio::select! {
                    flushed = bus.flush() => flushed.map_err(Failure::from),
                    () = signals.next() => Ok(()),
                };
                ended.and(flushed)
            }
        }
    } else {
        let mut runner = ConsumerRunner::new(consumers);
        if let Some(address) = Environment::process().get(BIND_VARIABLE) {
            runner = runner.bind(address);
        }
        // Before they start: what comes meanwhile is heard too.
        let heard_later = Signals::new()?;
        let running = tokio::select! {
            biased;
            started = runner.start() => Unheld::new(started?),
            () = signals.next() => {
                tracing::info!("stopped while its consumers were starting");
                return bus.close().await.map_err(Failure::from);
            }
        };
        let stopping = running.running().clone().until(heard_later);
        let main = main(bus.clone());
        tokio::pin!(stopping, main);
        tokio::select! {
            biased;
            stopped = &mut stopping => {
                // Without a signal nobody has told the services of main to stop.
                let ended = if signals.heard() { ends(main).await } else { Ok(()) };
                stopped.map_err(Failure::from).and(ended)
            }
            outcome = &mut main => match outcome {
                Ok(()) => stopping.await.map_err(Failure::from),
                Err(failure) => {
                    // By the same future, which may be stopping already, and which a second signal forces.
                    running.running().stop_soon();
                    if let Err(error) = stopping.await {
                        tracing::error!(%error, "not stopped in order");
                    }
                    Err(failure)
                }
            },
        }
    };
    let closed = bus.close().await.map_err(Failure::from);
    outcome.and(closed)
}

/// After a signal: the services that `main` runs itself have heard it too, and drain. A `main` without any is not waited for, since
/// it may be one that never returns.
async fn ends(main: Pin<&mut impl Future<Output = Result<(), Failure>>>) -> Result<(), Failure> {
    if !somebody_listens() {
        return Ok(());
    }
    let late = async {
        nobody_listens().await;
        tokio::time::sleep(CANCEL_GRACE).await;
    };
    tokio::select! {
        biased;
        outcome = main => outcome,
        () = late => Ok(()),
    }
}
