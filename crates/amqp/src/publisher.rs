//! One confirm channel: a task that writes in the order of its queue, keeps what is unconfirmed, and starts afresh on
//! the next connection.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use lapin::{
    Channel, Confirmation,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use polymq_core::{Error, ErrorKind, Message, Result, Retry, until};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep},
};

use crate::{
    NAME,
    config::{AmqpConfig, QueueType},
    convert::{self, short},
    error::{self, Stage},
    inflight::{Entry, InFlight},
    link::{Change, LinkHandle, Live},
    pool::{Item, Outgoing, Route},
    topology::{self, DELAY_MARGIN, DelayQueue, delay_step},
};

/// Wait before a channel that could not be opened is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// How many withdrawn messages may lie about before they are looked for while nothing can be sent.
const SWEEP_FROM: usize = 1024;
/// How often they are looked for while somebody waits for a flush.
const SWEEP_EVERY: Duration = Duration::from_millis(500);

/// One channel of the pool.
pub(crate) struct Publisher {
    link: Arc<LinkHandle>,
    config: Arc<AmqpConfig>,
    inbox: mpsc::UnboundedReceiver<Item>,
    /// Not written yet, in order.
    waiting: VecDeque<Item>,
    sweep_at: usize,
    /// Flushes in `waiting`: somebody waits for messages that may be withdrawn meanwhile.
    held: usize,
    written: InFlight,
    flushes: VecDeque<(u64, oneshot::Sender<()>)>,
}

/// A channel with confirms, and what ends it.
struct Session {
    link: Arc<LinkHandle>,
    live: Live,
    channel: Arc<Channel>,
    /// Where delay queues are declared: the broker ends a channel on a refusal, and with it every unconfirmed message.
    declares: Option<Channel>,
    failure: Option<lapin::Error>,
}

impl Session {
    async fn declare_delay(&mut self, route: &Route, ttl: Duration, queue_type: QueueType) -> Result<String> {
        let delay = DelayQueue { exchange: &route.exchange, routing_key: &route.routing_key, ttl };
        let open = self.declares.take().filter(|channel| channel.status().connected());
        let declared = async {
            let channel = match open {
                Some(channel) => channel,
                None => {
                    let opened = self.live.connection.create_channel().await;
                    opened.map_err(|error| error::native("declare", error, Stage::Operation))?
                }
            };
            topology::ensure_delay(&channel, &delay, queue_type).await?;
            Ok(channel)
        };
        self.declares = Some(self.link.unless_lost(&self.live, "declare", declared).await?);
        Ok(delay.name())
    }

    /// The first failure counts, but the broker's own words count more than their consequences.
    fn fail(&mut self, error: lapin::Error) {
        if self.failure.as_ref().is_none_or(|known| !error::is_channel_only(known) && error::is_channel_only(&error)) {
            self.failure = Some(error);
        }
    }

    fn fail_disconnected(&mut self) {
        self.fail(lapin::ErrorKind::InvalidConnectionState(lapin::ConnectionState::Error).into());
    }
}

impl Publisher {
    pub(crate) fn new(link: Arc<LinkHandle>, config: Arc<AmqpConfig>, inbox: mpsc::UnboundedReceiver<Item>) -> Self {
        Self {
            link,
            config,
            inbox,
            waiting: VecDeque::new(),
            sweep_at: SWEEP_FROM,
            held: 0,
            written: InFlight::default(),
            flushes: VecDeque::new(),
        }
    }

    /// Runs until there is nobody left, or no connection to be had.
    pub(crate) async fn run(mut self) {
        while let ControlFlow::Continue(()) = self.session().await {}
        self.inbox.close();
        while let Ok(item) = self.inbox.try_recv() {
            self.waiting.push_back(item);
        }
        for item in self.waiting.drain(..) {
            if let Item::Publish(outgoing) = item {
                outgoing.answer.complete(Err(error::closed("send")));
            }
        }
    }

    /// From one connection, or channel, to its end.
    async fn session(&mut self) -> ControlFlow<()> {
        let link = Arc::clone(&self.link);
        let mut connecting = pin!(link.live());
        let live = loop {
            tokio::select! {
                live = &mut connecting => match live {
                    Ok(live) => break live,
                    Err(_) => return ControlFlow::Break(()),
                },
                item = self.inbox.recv() => match item {
                    Some(item) => self.wait(item),
                    None => return ControlFlow::Break(()),
                },
                () = sleep(SWEEP_EVERY), if self.held > 0 => self.sweep(),
            }
        };
        let failed = |error| error::native("send", error, Stage::Operation);
        let opened = self.link.unless_lost(&live, "send", async {
            let channel = live.connection.create_channel().await.map_err(failed)?;
            channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(failed)?;
            Ok(Arc::new(channel))
        });
        let channel = match opened.await {
            Ok(channel) => channel,
            Err(error) => {
                tracing::debug!(%error, "cannot open a channel, trying again");
                sleep(RETRY_AFTER).await;
                return ControlFlow::Continue(());
            }
        };
        let mut session = Session { link: Arc::clone(&link), live, channel, declares: None, failure: None };
        let end = self.serve(&mut session).await;
        self.settle(&mut session).await;
        self.fail_written(&session);
        end
    }

    async fn serve(&mut self, session: &mut Session) -> ControlFlow<()> {
        let mut changes = self.link.watch();
        let mut batch = Vec::new();
        loop {
            if session.live.blocked.is_none() {
                self.write(session).await;
            }
            self.settle(session).await;
            if session.failure.is_some() {
                return ControlFlow::Continue(());
            }
            tokio::select! {
                change = changes.changed(&session.live) => match change {
                    Change::Lost => {
                        session.fail_disconnected();
                        return ControlFlow::Continue(());
                    }
                    Change::Blocked(blocked) => session.live.blocked = blocked,
                },
                () = self.written.confirm(), if self.written.is_pending() => {}
                count = self.inbox.recv_many(&mut batch, 256) => {
                    if count == 0 {
                        // Every handle is gone; what was written is still to be answered.
                        return self.finish(session).await;
                    }
                    batch.drain(..).for_each(|item| self.wait(item));
                }
                () = sleep(SWEEP_EVERY), if session.live.blocked.is_some() && self.held > 0 => self.sweep(),
            }
        }
    }

    async fn finish(&mut self, session: &mut Session) -> ControlFlow<()> {
        while session.failure.is_none() && self.written.is_pending() {
            self.written.confirm().await;
            self.settle(session).await;
        }
        ControlFlow::Break(())
    }

    /// Queues an item. While nothing can be sent, withdrawn messages are dropped now and then, so that an outage of an
    /// hour does not hold an hour of messages.
    fn wait(&mut self, item: Item) {
        let flush = matches!(item, Item::Flush(_));
        self.held += usize::from(flush);
        self.waiting.push_back(item);
        if flush || self.waiting.len() >= self.sweep_at {
            self.sweep();
        }
    }

    /// Drops withdrawn messages, and counts flushes that wait for nothing but what is written.
    fn sweep(&mut self) {
        self.waiting.retain(|item| !matches!(item, Item::Publish(outgoing) if outgoing.answer.is_abandoned()));
        self.sweep_at = (self.waiting.len() * 2).max(SWEEP_FROM);
        while let Some(Item::Flush(_)) = self.waiting.front() {
            if let Some(Item::Flush(done)) = self.waiting.pop_front() {
                self.held -= 1;
                self.flushes.push_back((self.written.next(), done));
            }
        }
        self.answer_flushes();
    }

    async fn write(&mut self, session: &mut Session) {
        while session.failure.is_none() {
            let Some(item) = self.waiting.pop_front() else { break };
            match item {
                Item::Flush(done) => {
                    self.held -= 1;
                    self.flushes.push_back((self.written.next(), done));
                    self.answer_flushes();
                }
                Item::Publish(outgoing) => self.publish(session, outgoing).await,
            }
        }
    }

    async fn publish(&mut self, session: &mut Session, outgoing: Outgoing) {
        if outgoing.answer.is_abandoned() {
            return;
        }
        if outgoing.answer.is_stale() {
            outgoing.answer.complete(Err(error::stale()));
            return;
        }
        let prepared = self.prepare(session, &outgoing).await;
        let (target, delay) = match prepared {
            Ok(prepared) => prepared,
            Err(error) if error.kind() == ErrorKind::Disconnected => {
                // Nothing was written: it waits for the next connection.
                self.waiting.push_front(Item::Publish(outgoing));
                session.fail_disconnected();
                return;
            }
            Err(error) => {
                outgoing.answer.complete(Err(error.with_operation("send").with_channel(&*outgoing.route.routing_key)));
                return;
            }
        };
        if !outgoing.answer.hand_over() {
            return;
        }
        let confirm = target.publish(Arc::clone(&session.channel), outgoing.message.payload().clone());
        match self.written.push(Entry::new(outgoing, delay), confirm) {
            Ok(()) => {}
            Err(refused) => {
                let (outgoing, error) = *refused;
                outgoing.answer.take_back();
                self.waiting.push_front(Item::Publish(outgoing));
                session.fail(error);
            }
        }
    }

    /// Makes what the message needs, and says where it goes.
    async fn prepare(
        &mut self,
        session: &mut Session,
        outgoing: &Outgoing,
    ) -> Result<(Target, Option<(Duration, Instant)>)> {
        let route = &outgoing.route;
        self.ensure(session, route).await?;
        let wait = outgoing.message.deliver_at().map(until).filter(|wait| !wait.is_zero());
        let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let Some(wait) = wait else {
            let target = Target {
                exchange: short(&route.exchange)?,
                routing_key: short(&route.routing_key)?,
                options: BasicPublishOptions { mandatory: route.is_queue(), ..BasicPublishOptions::default() },
                properties: convert::properties(&outgoing.message, route.persistent, true)?,
            };
            return Ok((target, None));
        };
        let ttl = delay_step(wait);
        let name = session.declare_delay(route, ttl, self.config.queue_type).await?;
        let target = Target {
            exchange: short("")?,
            routing_key: short(&name)?,
            options: mandatory,
            // Expiring in the delay queue would mean being delivered early.
            properties: convert::properties(&outgoing.message, route.persistent, false)?,
        };
        Ok((target, Some((ttl, Instant::now()))))
    }

    async fn ensure(&mut self, session: &Session, route: &Route) -> Result<()> {
        let generation = session.live.generation;
        if (route.plan.is_none() && !route.declare_exchange) || route.ensured.load(Ordering::Acquire) == generation {
            return Ok(());
        }
        let made = route.ensure(&session.live.connection, self.config.declare);
        self.link.unless_lost(&session.live, "declare", made).await?;
        route.ensured.store(generation, Ordering::Release);
        Ok(())
    }

    /// Answers what has been confirmed.
    async fn settle(&mut self, session: &mut Session) {
        loop {
            let confirms = self.written.certain(&session.channel);
            if confirms.is_empty() {
                return;
            }
            for (sequence, result) in confirms {
                match result {
                    Ok(confirmation) => self.confirmed(session, sequence, confirmation.is_nack()).await,
                    // The rest of the channel fails with it, together.
                    Err(error) => session.fail(error),
                }
            }
            self.answer_flushes();
        }
    }

    async fn confirmed(&mut self, session: &mut Session, sequence: u64, nack: bool) {
        let Some(Entry { outgoing, returned, delay }) = self.written.take(sequence) else { return };
        let name = || outgoing.route.routing_key.to_string();
        let result = if let Some(reason) = returned {
            // It is made again for the next message, where it may be.
            outgoing.route.ensured.store(0, Ordering::Release);
            Err(Error::new(ErrorKind::Unroutable, format!("the broker returned the message: {reason}"))
                .with_hint("no queue of that name exists any more"))
        } else if nack {
            Err(Error::new(ErrorKind::Refused, "the broker refused the message")
                .with_retry(Retry::Now)
                .with_hint("the queue may be full (x-max-length) or its node in trouble; look at the broker's log"))
        } else {
            outlive(session, &outgoing, delay, self.config.queue_type).await.map(|()| outgoing.message.id().cloned())
        };
        let result = result.map_err(|error| error.with_backend(NAME).with_operation("send").with_channel(name()));
        outgoing.answer.complete(result);
    }

    fn answer_flushes(&mut self) {
        while self.flushes.front().is_some_and(|(until, _)| *until <= self.written.oldest()) {
            if let Some((_, done)) = self.flushes.pop_front() {
                let _ = done.send(());
            }
        }
    }

    /// The channel has ended: what was written and not confirmed gets its answer.
    fn fail_written(&mut self, session: &Session) {
        let failure = session.failure.as_ref();
        let blamed = failure.filter(|error| error::is_channel_only(error));
        let reason = match failure {
            Some(error) if self.link.is_up() => error::text(error),
            _ => self.link.reason().to_string(),
        };
        for Outgoing { route, answer, message } in self.written.abandon() {
            let error = match blamed {
                Some(error) if is_blamed(error, &route, &message) => {
                    route.ensured.store(0, Ordering::Release);
                    // Which of several such messages the broker refused, it does not say.
                    error::native("send", error.clone(), Stage::Operation).with_retry(Retry::UnknownOutcome)
                }
                _ => error::unknown("send", &reason),
            };
            answer.complete(Err(error.with_channel(&*route.routing_key)));
        }
        self.answer_flushes();
        if !session.channel.status().connected() && blamed.is_none() {
            self.link.suspect();
        }
    }
}

/// Where one message goes, in the words of the client library.
struct Target {
    exchange: lapin::types::ShortString,
    routing_key: lapin::types::ShortString,
    options: BasicPublishOptions,
    properties: lapin::BasicProperties,
}

impl Target {
    async fn publish(self, channel: Arc<Channel>, payload: Bytes) -> lapin::Result<Confirmation> {
        let Self { exchange, routing_key, options, properties } = self;
        channel.basic_publish(exchange, routing_key, options, &payload, properties).await?.await
    }
}

/// A delay queue must live longer than the message in it: when the confirm took long, its life is renewed.
async fn outlive(
    session: &mut Session,
    outgoing: &Outgoing,
    delay: Option<(Duration, Instant)>,
    queue_type: QueueType,
) -> Result<()> {
    let Some((ttl, since)) = delay.filter(|(_, since)| since.elapsed() > DELAY_MARGIN / 4) else { return Ok(()) };
    let renewed = if since.elapsed() > ttl + DELAY_MARGIN {
        Err(Error::new(ErrorKind::UnknownOutcome, "the confirm took longer than the delay queue lives"))
    } else {
        session.declare_delay(&outgoing.route, ttl, queue_type).await
    };
    renewed.map(drop).map_err(|error| error.with_kind(ErrorKind::UnknownOutcome))
}

/// Whether a channel error can be about this message.
fn is_blamed(error: &lapin::Error, route: &Route, message: &Message) -> bool {
    let text = error::text(error);
    match error::kind(error, Stage::Operation) {
        ErrorKind::TooLarge => text.contains(&format!("size {} ", message.payload().len())),
        // "no exchange 'x' in vhost", "access to exchange 'x' in vhost".
        ErrorKind::NotFound | ErrorKind::PermissionDenied => {
            text.contains(&format!("'{}'", route.exchange)) || (route.is_queue() && text.contains("'amq.default'"))
        }
        _ => true,
    }
}
