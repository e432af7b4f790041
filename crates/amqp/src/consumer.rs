//! Receiving: a background task per consumer that subscribes, feeds, acknowledges, and subscribes again after a loss.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt};
use lapin::{
    Channel,
    message::Delivery,
    options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};
use polymq_core::{Consumer, Details, Error, ErrorKind, Incoming, Result, Settler, Token};
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    config::Declare,
    convert::{self, short},
    error::{self, Stage},
    health::Line,
    link::{CLOSE_TIMEOUT, LinkHandle, Live},
    pool::Publishers,
    settle::{AmqpSettler, Shared, TICK},
    topology::{self, QueuePlan},
};

/// The most messages moved at a time from the connection to the reader.
const BATCH: usize = 256;
/// Wait before a subscription that the broker refused is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What a consumer reads.
#[derive(Debug, Clone)]
pub(crate) struct Subscription {
    pub(crate) plan: QueuePlan,
    pub(crate) prefetch: u16,
    /// The routing key of each message is its channel.
    pub(crate) wildcard: bool,
}

/// A consumer of a queue.
#[derive(Debug)]
pub(crate) struct AmqpConsumer {
    shared: Arc<Shared>,
    settler: Arc<AmqpSettler>,
    stopped: watch::Receiver<bool>,
}

/// What the connection needs to close a consumer that is still open.
#[derive(Debug, Clone)]
pub(crate) struct ConsumerHandle {
    shared: Arc<Shared>,
    stopped: watch::Receiver<bool>,
}

impl ConsumerHandle {
    pub(crate) fn is_gone(&self) -> bool {
        self.stopped.has_changed().is_err()
    }

    /// Stops fetching; what was received can still be settled.
    pub(crate) async fn stop(&mut self) {
        self.shared.start_close();
        wait(&mut self.stopped).await;
    }

    /// Ends it: what is not settled by now is stale, and the broker delivers it again.
    pub(crate) fn abandon(&self) {
        self.shared.abandon();
    }
}

async fn wait(stopped: &mut watch::Receiver<bool>) {
    // Bounded for a broker that does not answer; without a connection there is nothing to return.
    let _ = timeout(CLOSE_TIMEOUT, stopped.wait_for(|stopped| *stopped)).await;
}

impl AmqpConsumer {
    /// Subscribes; with `background`, a connection that is down is waited for there.
    pub(crate) async fn start(
        link: Arc<LinkHandle>,
        publishers: Arc<Publishers>,
        subscription: Subscription,
        background: bool,
        bound: Duration,
    ) -> Result<(Self, ConsumerHandle)> {
        let shared = Shared::new(&subscription.plan, subscription.prefetch.into(), publishers);
        let settler = Arc::new(AmqpSettler(Arc::clone(&shared)));
        let (stop, stopped) = watch::channel(false);
        let (ready, first) = oneshot::channel();
        let task = Task {
            link: Arc::clone(&link),
            shared: Arc::clone(&shared),
            subscription,
            random: fastrand::u64(..),
            limit: bound,
            stop,
        };
        // Dropped on every early return below, which ends the task.
        let consumer = Self { shared: Arc::clone(&shared), settler, stopped: stopped.clone() };
        let wait = !background || link.is_up();
        // Without somebody to hear of it, a first failure is as little final as a later one.
        link.spawn(task.run(wait.then_some(ready)));
        if wait {
            match timeout(bound, first).await {
                Ok(Ok(answer)) => answer?,
                Ok(Err(_)) => return Err(error::closed("consume")),
                Err(_) if link.is_up() => return Err(error::timeout("consume")),
                Err(_) => return Err(error::disconnected("consume", &link.reason())),
            }
        }
        Ok((consumer, ConsumerHandle { shared, stopped }))
    }
}

#[async_trait]
impl Consumer for AmqpConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        loop {
            // Nothing is taken while this waits, so dropping the future loses nothing.
            if let Some(result) = self.shared.take(max, into) {
                return result;
            }
            self.shared.arrived.notified().await;
        }
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::clone(&self.settler) as Arc<dyn Settler>
    }

    async fn close(&mut self) -> Result<()> {
        self.shared.start_close();
        let told = async {
            let _ = self.stopped.wait_for(|stopped| *stopped).await;
            // The end of the channel is answered after everything that was settled before it was read.
            while self.shared.is_finished() && self.stopped.changed().await.is_ok() {}
        };
        let _ = timeout(CLOSE_TIMEOUT, told).await;
        Ok(())
    }
}

impl Drop for AmqpConsumer {
    fn drop(&mut self) {
        self.shared.start_close();
    }
}

struct Task {
    link: Arc<LinkHandle>,
    shared: Arc<Shared>,
    subscription: Subscription,
    /// Tells queues of its own from those of others.
    random: u64,
    /// How long the broker may take to answer.
    limit: Duration,
    stop: watch::Sender<bool>,
}

/// How a subscription ended.
enum End {
    Lost,
    Closing,
}

impl Task {
    async fn run(self, mut ready: Option<oneshot::Sender<Result<()>>>) {
        loop {
            let shared = Arc::clone(&self.shared);
            let live = tokio::select! {
                live = self.link.live() => live,
                () = closing(&shared) => break,
            };
            let live = match live {
                Ok(live) => live,
                Err(error) => {
                    self.fail(&mut ready, error);
                    break;
                }
            };
            let subscribed = tokio::select! {
                subscribed = self.link.unless_lost(&live, "consume", self.subscribe(&live)) => subscribed,
                () = closing(&shared) => break,
            };
            match subscribed {
                Ok((channel, stream, queue)) => {
                    self.tell(None);
                    if let Some(ready) = ready.take() {
                        let _ = ready.send(Ok(()));
                    }
                    match self.feed(&live, channel, stream, queue).await {
                        End::Lost => self.shared.end(),
                        End::Closing => break,
                    }
                }
                Err(error) if ready.is_some() || self.is_final(&error) => {
                    self.fail(&mut ready, error);
                    break;
                }
                Err(error) => {
                    tracing::warn!(queue = %self.subscription.plan.name, %error, "cannot subscribe, trying again");
                    // A connection that has just ended is soon known to have.
                    let soon = error.kind() == ErrorKind::Disconnected;
                    if !soon {
                        self.tell(Some(error.message()));
                    }
                    tokio::select! {
                        () = sleep(if soon { RETRY_AFTER / 10 } else { RETRY_AFTER }) => {}
                        () = closing(&shared) => break,
                    }
                }
            }
        }
        self.tell(None);
        self.shared.end();
        self.stop.send_replace(true);
    }

    /// Lets the users know why this consumer gets nothing, if so.
    fn tell(&self, reason: Option<&str>) {
        let line = Line::Consumer(self.random);
        self.link
            .health
            .set(line, reason.map(|why| format!("cannot subscribe to {:?}: {why}", self.subscription.plan.name)));
    }

    fn fail(&self, ready: &mut Option<oneshot::Sender<Result<()>>>, error: Error) {
        self.shared.fail(&error);
        if let Some(ready) = ready.take() {
            let _ = ready.send(Err(error));
        }
    }

    /// Errors that trying again does not mend. While a node of a cluster starts, its queues are "not found": with
    /// `declare` that is not final.
    fn is_final(&self, error: &Error) -> bool {
        match error.kind() {
            ErrorKind::NotFound => self.subscription.plan.declare != Declare::Auto,
            kind => matches!(
                kind,
                ErrorKind::PermissionDenied | ErrorKind::Conflict | ErrorKind::Unsupported | ErrorKind::InvalidInput
            ),
        }
    }

    /// Subscribes on a channel of its own, bounded: a queue whose broker is starting may take its time to answer.
    async fn subscribe(&self, live: &Live) -> Result<(Channel, lapin::Consumer, Arc<str>)> {
        let late = |_| error::timeout("consume");
        let channel = timeout(self.limit, live.connection.create_channel()).await.map_err(late)?.map_err(failed)?;
        let unless_subscribed = CloseOnDrop(Some(channel.clone()));
        let (stream, queue) = timeout(self.limit, self.subscribe_on(live, &channel)).await.map_err(late)??;
        unless_subscribed.disarm();
        Ok((channel, stream, queue))
    }

    async fn subscribe_on(&self, live: &Live, channel: &Channel) -> Result<(lapin::Consumer, Arc<str>)> {
        let mut plan = self.subscription.plan.clone();
        if plan.exclusive && plan.binding.is_some() {
            // The queue of a lost connection may live on for a while, so each connection has its own.
            plan.name = format!("{}@{:016x}-{}", plan.name, self.random, live.generation).into();
        }
        if let Some(binding) = &plan.binding {
            topology::ensure_exchange(&live.connection, &binding.exchange, plan.declare).await?;
        }
        topology::ensure(&live.connection, &plan).await?;
        channel.basic_qos(self.subscription.prefetch, BasicQosOptions::default()).await.map_err(failed)?;
        // Unique, so that two processes are never taken for one.
        let tag = format!("polymq-{}-{:016x}", std::process::id(), fastrand::u64(..));
        let consume = channel.basic_consume(
            short(&*plan.name)?,
            short(&tag)?,
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let stream = consume.await.map_err(|error| failed(error).with_channel(&*plan.name))?;
        Ok((stream, plan.name))
    }

    async fn feed(&self, live: &Live, channel: Channel, mut stream: lapin::Consumer, queue: Arc<str>) -> End {
        let generation = self.shared.begin(channel.clone(), queue);
        let mut changes = self.link.watch();
        let mut batch = Vec::new();
        let mut deadline = Instant::now();
        loop {
            // Not a sleep of its own for each turn: under load that would never end.
            let armed = self.shared.is_armed();
            if armed && deadline < Instant::now() {
                deadline = Instant::now() + TICK;
            }
            tokio::select! {
                delivery = stream.next() => {
                    let mut next = Some(delivery);
                    while let Some(Some(Ok(delivery))) = next {
                        batch.push(self.incoming(delivery));
                        next = if batch.len() < BATCH { stream.next().now_or_never() } else { None };
                    }
                    if !batch.is_empty() {
                        self.shared.push(generation, &mut batch);
                    }
                    match next {
                        Some(None) => return self.lost("the broker ended the subscription"),
                        Some(Some(Err(error))) => {
                            if error::is_overdue(&error) {
                                self.warn_of_overdue();
                            }
                            return self.lost(&error::text(&error));
                        }
                        _ => {}
                    }
                }
                () = sleep_until(deadline), if armed => self.shared.tick(),
                () = self.shared.work.notified() => {
                    if self.shared.is_closing() {
                        return self.wind_up(live, channel, stream, generation).await;
                    }
                }
                () = changes.lost(live) => return self.lost("the connection was lost"),
            }
        }
    }

    fn warn_of_overdue(&self) {
        tracing::warn!(
            queue = %self.subscription.plan.name,
            "a message was unsettled for longer than the broker allows, which ended the subscription: all that is unsettled \
             comes again. Raise the broker's consumer_timeout, or the queue's x-consumer-timeout, above what the slowest handler takes, \
             with its retries in place"
        );
    }

    fn lost(&self, reason: &str) -> End {
        tracing::info!(queue = %self.subscription.plan.name, reason, "subscription ended, subscribing again");
        self.link.suspect();
        End::Lost
    }

    /// Stops fetching, returns what nobody received, and stays until the rest is settled.
    async fn wind_up(&self, live: &Live, channel: Channel, mut stream: lapin::Consumer, generation: u64) -> End {
        let mut batch = Vec::new();
        let cancel = async {
            let cancelled = channel.basic_cancel(stream.tag(), BasicCancelOptions::default()).await;
            while let Some(Ok(delivery)) = stream.next().await {
                batch.push(self.incoming(delivery));
            }
            cancelled
        };
        let cancelled = timeout(CLOSE_TIMEOUT, cancel).await;
        self.shared.push(generation, &mut batch);
        self.shared.wind_up();
        if matches!(cancelled, Ok(Ok(()))) {
            // An answered request proves that the broker has read every frame before it.
            let barrier = channel.basic_qos(self.subscription.prefetch, BasicQosOptions::default());
            let _ = timeout(CLOSE_TIMEOUT, barrier).await;
        }
        self.stop.send_replace(true);
        let mut changes = self.link.watch();
        while !self.shared.is_finished() {
            tokio::select! {
                () = self.shared.work.notified() => {}
                () = changes.lost(live) => return End::Closing,
            }
        }
        self.shared.wind_up();
        let _ = timeout(CLOSE_TIMEOUT, channel.close(200, "done".into())).await;
        End::Closing
    }

    fn incoming(&self, delivery: Delivery) -> Incoming {
        let mut message = convert::message(&delivery.properties, delivery.data);
        let channel = self.subscription.wildcard.then(|| {
            let known = message.system_headers().get(convert::CHANNEL).map(Arc::from);
            known.unwrap_or_else(|| Arc::<str>::from(delivery.routing_key.as_str()))
        });
        if let Some(channel) = &channel {
            message.set_system_header(convert::CHANNEL, channel.to_string());
        }
        let told = delivery.redelivered || channel.is_some();
        let details = || Box::new(Details { channel, redelivered: delivery.redelivered, ..Details::default() });
        Incoming { message, token: Token(delivery.delivery_tag), details: told.then(details) }
    }
}

/// Closes a channel on which a subscription was given up, by its own time-out or because nobody waits for it any more. The
/// answer would come yet, the client library keeps the channel for it, and the broker would give it messages that nobody reads.
struct CloseOnDrop(Option<Channel>);

impl CloseOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        if let Some(channel) = &self.0 {
            // The first poll hands the frame to the connection.
            let _ = channel.close(200, "given up".into()).now_or_never();
        }
    }
}

fn failed(error: lapin::Error) -> Error {
    error::native("consume", error, Stage::Operation)
}

async fn closing(shared: &Shared) {
    while !shared.is_closing() {
        shared.work.notified().await;
    }
}
