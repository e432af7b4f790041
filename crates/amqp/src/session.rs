//! A confirm channel from its opening to its end: what it declares, where a message goes on it, what has ended it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use lapin::{Channel, options::ConfirmSelectOptions};
use polymq_core::{Error, ErrorKind, Message, Result, Retry, until};
use tokio::time::{Instant, timeout};

use crate::{
    config::{AmqpConfig, QueueType},
    convert::{self, short},
    error::{self, Stage},
    inflight::Target,
    link::{LinkHandle, Live},
    pool::{Outgoing, Route},
    topology::{self, DELAY_MARGIN, DelayQueue, delay_step},
};

/// For how many times the bound of a declaration the broker is not asked again for what it has not answered.
const SILENCE: u32 = 3;

/// A channel with confirms.
pub(crate) struct Session {
    link: Arc<LinkHandle>,
    config: Arc<AmqpConfig>,
    pub(crate) live: Live,
    pub(crate) channel: Arc<Channel>,
    /// Where delay queues are declared: the broker ends a channel on a refusal, and with it every unconfirmed message.
    declares: Option<Channel>,
    /// Where the broker has not answered a declaration, and until when it is not asked again: everything on this channel
    /// waits while it is. Few: each took as long as a declaration may take.
    silent: Vec<(Arc<Route>, Instant)>,
    pub(crate) failure: Option<lapin::Error>,
}

/// The time that a message spends in a classic delay queue, and when that queue was declared.
pub(crate) type Delay = (Duration, Instant);

impl Session {
    pub(crate) async fn open(link: Arc<LinkHandle>, config: Arc<AmqpConfig>, live: Live) -> Result<Self> {
        let opened = link.unless_lost(&live, "send", async {
            let channel = live.connection.create_channel().await.map_err(failed("send"))?;
            channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(failed("send"))?;
            Ok(Arc::new(channel))
        });
        let channel = opened.await?;
        Ok(Self { link, config, live, channel, declares: None, silent: Vec::new(), failure: None })
    }

    /// The first failure counts, but the broker's own words count more than their consequences.
    pub(crate) fn fail(&mut self, error: lapin::Error) {
        if self.failure.as_ref().is_none_or(|known| !error::is_channel_only(known) && error::is_channel_only(&error)) {
            self.failure = Some(error);
        }
    }

    pub(crate) fn fail_disconnected(&mut self) {
        self.fail(lapin::ErrorKind::InvalidConnectionState(lapin::ConnectionState::Error).into());
    }

    /// Sees whether the broker takes messages.
    pub(crate) fn look(&mut self) {
        self.live.blocked = self.link.blocks(&self.live);
    }

    pub(crate) fn may_write(&self) -> bool {
        self.failure.is_none() && self.live.blocked.is_none()
    }

    /// Whether a message can be written without asking the broker for anything before.
    pub(crate) fn is_ready_for(&self, outgoing: &Outgoing) -> bool {
        wait_of(&outgoing.message).is_none() && self.is_ensured(&outgoing.route)
    }

    /// Makes what the message needs, and says where it goes.
    pub(crate) async fn prepare(&mut self, outgoing: &Outgoing) -> Result<(Target, Option<Delay>)> {
        if !self.is_ready_for(outgoing) {
            self.unless_silent(&outgoing.route)?;
        }
        let prepared = self.make(outgoing).await;
        if prepared.as_ref().is_err_and(|error| error.kind() == ErrorKind::Timeout) {
            self.silent.push((Arc::clone(&outgoing.route), Instant::now() + self.config.connect_timeout * SILENCE));
        }
        prepared
    }

    /// Refuses what the broker would have to be asked for again too soon.
    fn unless_silent(&mut self, route: &Route) -> Result<()> {
        let now = Instant::now();
        self.silent.retain(|(_, until)| *until > now);
        match self.silent.iter().find(|(silent, _)| silent.leads_as(route)) {
            None => Ok(()),
            Some((_, until)) => {
                let sentence = "the broker did not answer a declaration for this lately, and is not asked again yet";
                Err(Error::new(ErrorKind::Timeout, sentence).with_retry(Retry::After(*until - now)))
            }
        }
    }

    async fn make(&mut self, outgoing: &Outgoing) -> Result<(Target, Option<Delay>)> {
        let route = &outgoing.route;
        if !self.is_ensured(route) {
            let (live, declare) = (self.live.clone(), self.config.declare);
            self.declare(route.ensure(&live.connection, declare)).await?;
            route.ensured.store(self.live.generation, Ordering::Release);
        }
        let Some(wait) = wait_of(&outgoing.message) else {
            let target = Target {
                exchange: short(&*route.exchange)?,
                routing_key: short(&*route.routing_key)?,
                mandatory: route.is_queue(),
                properties: convert::properties(&outgoing.message, route.persistent, true)?,
            };
            return Ok((target, None));
        };
        let queue_type = route.delay_type();
        let ttl = delay_step(wait, queue_type);
        let name = self.declare_delay(route, ttl).await?;
        let target = Target {
            exchange: short("")?,
            routing_key: short(name)?,
            mandatory: true,
            // Expiring in the delay queue would mean being delivered early.
            properties: convert::properties(&outgoing.message, route.persistent, false)?,
        };
        // A quorum queue stays.
        Ok((target, (queue_type == QueueType::Classic).then(|| (ttl, Instant::now()))))
    }

    fn is_ensured(&self, route: &Route) -> bool {
        let nothing_to_make = route.plan.is_none() && !route.declare_exchange;
        nothing_to_make || route.ensured.load(Ordering::Acquire) == self.live.generation
    }

    async fn declare_delay(&mut self, route: &Route, ttl: Duration) -> Result<String> {
        let queue_type = route.delay_type();
        let delay = DelayQueue { exchange: &route.exchange, routing_key: &route.routing_key, ttl, queue_type };
        let open = self.declares.take().filter(|channel| channel.status().connected());
        let live = self.live.clone();
        let declared = async {
            let channel = match open {
                Some(channel) => channel,
                None => live.connection.create_channel().await.map_err(failed("declare"))?,
            };
            topology::ensure_delay(&channel, &delay).await?;
            Ok(channel)
        };
        self.declares = Some(self.declare(declared).await?);
        Ok(delay.name())
    }

    /// Waits for the answer to a declaration, for as long as one may take. A broker short of memory answers when that is over:
    /// then this ends with [`Live::blocked`], and there is time for what is confirmed and withdrawn meanwhile.
    async fn declare<T>(&mut self, requests: impl Future<Output = Result<T>>) -> Result<T> {
        let mut states = self.link.watch();
        let answer = timeout(self.config.connect_timeout, self.link.unless_lost(&self.live, "declare", requests));
        tokio::select! {
            biased;
            answer = answer => answer.unwrap_or_else(|_| Err(error::timeout("declare").with_retry(Retry::Now))),
            reason = states.blocked(&self.live) => {
                let sentence = format!("the broker takes nothing at present: {reason}");
                self.live.blocked = Some(reason);
                Err(Error::new(ErrorKind::Busy, sentence))
            }
        }
    }

    /// A delay queue must live longer than the message in it: when the confirm took long, its life is renewed.
    pub(crate) async fn outlive(&mut self, outgoing: &Outgoing, delay: Option<Delay>) -> Result<()> {
        let Some((ttl, since)) = delay.filter(|(_, since)| since.elapsed() > DELAY_MARGIN / 4) else { return Ok(()) };
        let renewed = if since.elapsed() > ttl + DELAY_MARGIN {
            Err(Error::new(ErrorKind::UnknownOutcome, "the confirm took longer than the delay queue lives"))
        } else {
            self.declare_delay(&outgoing.route, ttl).await
        };
        renewed.map(drop).map_err(|error| error.with_kind(ErrorKind::UnknownOutcome))
    }
}

fn wait_of(message: &Message) -> Option<Duration> {
    message.deliver_at().map(until).filter(|wait| !wait.is_zero())
}

fn failed(operation: &'static str) -> impl Fn(lapin::Error) -> Error {
    move |error| error::native(operation, error, Stage::Operation)
}
