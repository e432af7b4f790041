//! Handlers under test: a send returns when everything that it set off is done.

use std::time::Duration;

use polymq_core::{Bus, ConsumerFactory, ConsumerRunner, Message, Result, RouteStats, Running};
use serde::Serialize;

use crate::eventually;

/// How long handlers may take to settle everything. Under a paused clock this is no time at all.
const SETTLE: Duration = Duration::from_secs(60);

/// The handlers of a factory, running; sends wait for them. Needs a backend that counts its messages, such as memory.
///
/// With `#[tokio::test(start_paused = true)]`, retries after hours take milliseconds.
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> polymq_core::Result<()> {
/// use polymq_core::ConsumerFactory;
/// use polymq_testkit::{TestBus, TestService};
///
/// let bus = TestBus::new().await;
/// let mut consumers = ConsumerFactory::new(&bus);
/// consumers.route("orders", async |order: u64, bus: polymq_core::Context| {
///     bus.bus().queue("bills").send(&(order * 2)).await.map(drop)
/// });
/// let service = TestService::start(consumers).await?;
/// service.send_and_settle("orders", &21_u64).await?;
/// assert_eq!(bus.recorder().to("bills")[0].payload(), "42");
/// service.stop().await
/// # }
/// ```
#[derive(Debug)]
pub struct TestService {
    bus: Bus,
    addresses: Vec<polymq_core::Address>,
    running: Running,
}

impl TestService {
    /// Starts the handlers.
    ///
    /// # Errors
    /// Those of [`ConsumerRunner::start`].
    pub async fn start(consumers: ConsumerFactory) -> Result<Self> {
        let (bus, addresses) = (consumers.bus().clone(), consumers.addresses());
        let running = ConsumerRunner::new(consumers).drain_timeout(Duration::from_secs(5)).start().await?;
        Ok(Self { bus, addresses, running })
    }

    /// Sends to a queue and returns when every handler is idle and every message settled, those that handlers have
    /// sent to each other included.
    ///
    /// # Errors
    /// Those of sending.
    ///
    /// # Panics
    /// When the handlers are not done within a minute, with what waits where.
    pub async fn send_and_settle<T: Serialize + 'static>(&self, queue: &str, value: &T) -> Result<()> {
        self.bus.queue(queue).send(value).await?;
        self.settled().await;
        Ok(())
    }

    /// The same with a message of your own making.
    ///
    /// # Errors
    /// Those of sending.
    ///
    /// # Panics
    /// As [`send_and_settle`](Self::send_and_settle).
    pub async fn send_message_and_settle(&self, queue: &str, message: Message) -> Result<()> {
        self.bus.queue(queue).send_message(message).await?;
        self.settled().await;
        Ok(())
    }

    /// Waits until every handler is idle and every message settled.
    ///
    /// # Panics
    /// As [`send_and_settle`](Self::send_and_settle).
    pub async fn settled(&self) {
        eventually(SETTLE, || async {
            for address in &self.addresses {
                let stats = self.bus.channel(address.clone()).stats(None).await.map_err(|error| error.to_string())?;
                let held = stats.unsettled.unwrap_or(0);
                if stats.ready + held > 0 {
                    return Err(format!("{address}: {} wait and {held} are being handled", stats.ready));
                }
            }
            Ok(())
        })
        .await;
    }

    /// Counters of a subscription.
    ///
    /// # Panics
    /// When there is none of this name.
    #[must_use]
    pub fn stats(&self, name: &str) -> RouteStats {
        self.running.stats(name).expect("a subscription of this service")
    }

    /// The running service itself.
    #[must_use]
    pub fn running(&self) -> &Running {
        &self.running
    }

    /// Stops the handlers.
    ///
    /// # Errors
    /// Those of [`Running::stop`].
    pub async fn stop(self) -> Result<()> {
        self.running.stop().await
    }
}
