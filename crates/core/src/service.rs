//! A whole service: connect, run every linked consumer beside the program's own main, stop in order.

use std::future::Future;

use crate::{Bus, ConsumerFactory, ConsumerRunner, Environment, Failure, runner::Signals};

/// Where the service serves health and metrics, when it is set.
pub const BIND_VARIABLE: &str = "POLYMQ_BIND";

/// Runs a program: connects to what the environment chooses, starts every `#[consumer]` function that is linked,
/// then calls `main`. When `main` returns `Ok`, the consumers go on until SIGINT or SIGTERM and are drained; without
/// any consumer the program ends. A signal while `main` still runs drains the consumers beside it, then drops it.
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
    let outcome = if consumers.addresses().is_empty() {
        main(bus.clone()).await
    } else {
        let mut runner = ConsumerRunner::new(consumers);
        if let Some(address) = Environment::process().get(BIND_VARIABLE) {
            runner = runner.bind(address);
        }
        // From the first moment on, so that neither a handler nor a main that does not return is cut off.
        let signals = Signals::new()?;
        let running = runner.start().await?;
        let stopping = running.clone().until(signals);
        let main = main(bus.clone());
        tokio::pin!(stopping, main);
        tokio::select! {
            biased;
            stopped = &mut stopping => stopped.map_err(Failure::from),
            outcome = &mut main => match outcome {
                Ok(()) => stopping.await.map_err(Failure::from),
                Err(failure) => {
                    // By the same future, which may be stopping already, and which a second signal forces.
                    running.stop_soon();
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
