//! One confirm channel: a task that writes in the order of its queue, keeps what is unconfirmed, and starts afresh on
//! the next connection.

use std::{
    cmp::Reverse,
    collections::VecDeque,
    ops::ControlFlow,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use polymq_core::{Error, ErrorKind, Result, Retry};
use tokio::{
    sync::{mpsc, oneshot},
    task::yield_now,
    time::{sleep, timeout},
};

use crate::{
    NAME,
    config::AmqpConfig,
    error::{self, Stage},
    inflight::{self, Entry, InFlight},
    link::{Change, LinkHandle},
    pool::{Item, Outgoing, Route},
    refused::{self, Fate},
    session::Session,
};

/// Wait before a channel that could not be opened is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// How many withdrawn messages may lie about before they are looked for while nothing can be sent.
const SWEEP_FROM: usize = 1024;
/// How often they are looked for while somebody waits for a flush.
const SWEEP_EVERY: Duration = Duration::from_millis(500);
/// What is handed to the connection before it writes: more than a socket takes at once anyway.
const BURST_BYTES: usize = 256 * 1024;

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
                outgoing.answer.complete(Err(self.link.ended("send")));
            }
        }
    }

    /// From one connection, or channel, to its end.
    async fn session(&mut self) -> ControlFlow<()> {
        let mut opening = pin!(opened(Arc::clone(&self.link), Arc::clone(&self.config)));
        let mut session = loop {
            tokio::select! {
                session = &mut opening => match session {
                    Ok(session) => break session,
                    Err(_) => return ControlFlow::Break(()),
                },
                item = self.inbox.recv() => match item {
                    Some(item) => self.wait(item),
                    None => return ControlFlow::Break(()),
                },
                () = sleep(SWEEP_EVERY), if self.held > 0 => self.sweep(),
            }
        };
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
            let was_full = self.written.is_full();
            self.settle(session).await;
            if session.failure.is_some() {
                return ControlFlow::Continue(());
            }
            if was_full && !self.written.is_full() {
                continue;
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
                () = sleep(SWEEP_EVERY), if self.held > 0 && !self.may_write(session) => self.sweep(),
            }
        }
    }

    fn may_write(&self, session: &Session) -> bool {
        session.may_write() && !self.written.is_full()
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

    /// Writes what waits, and what comes meanwhile.
    async fn write(&mut self, session: &mut Session) {
        while self.write_burst(session).await {
            self.settle(session).await;
            yield_now().await;
        }
    }

    /// One burst; `false` when nothing waits any more, or nothing may be written.
    async fn write_burst(&mut self, session: &mut Session) -> bool {
        session.look();
        let burst = session.live.burst();
        let mut room = BURST_BYTES;
        while self.may_write(session) && room > 0 {
            if self.waiting.is_empty()
                && let Ok(item) = self.inbox.try_recv()
            {
                self.wait(item);
            }
            match self.waiting.pop_front() {
                None => return false,
                Some(Item::Flush(done)) => {
                    self.held -= 1;
                    self.flushes.push_back((self.written.next(), done));
                    self.answer_flushes();
                }
                Some(Item::Publish(outgoing)) => {
                    room = room.saturating_sub(inflight::weight(&outgoing));
                    if session.is_ready_for(&outgoing) {
                        self.publish(session, outgoing).await;
                    } else {
                        // The broker is asked, and must hear of it. It may confirm others meanwhile.
                        drop(burst);
                        self.publish(session, outgoing).await;
                        return self.may_write(session);
                    }
                }
            }
        }
        self.may_write(session)
    }

    async fn publish(&mut self, session: &mut Session, outgoing: Outgoing) {
        if outgoing.answer.is_abandoned() {
            return;
        }
        if outgoing.answer.is_stale() {
            outgoing.answer.complete(Err(error::stale()));
            return;
        }
        let (target, delay) = match session.prepare(&outgoing).await {
            Ok(prepared) => prepared,
            Err(error) if error.kind() == ErrorKind::Disconnected => {
                // Nothing was written: it waits for the next connection.
                self.waiting.push_front(Item::Publish(outgoing));
                session.fail_disconnected();
                return;
            }
            Err(_) if session.live.blocked.is_some() => {
                // It waits until the broker takes messages again.
                self.waiting.push_front(Item::Publish(outgoing));
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
        if let Err(refused) = self.written.write(&session.channel, target, Entry::new(outgoing, delay)) {
            let (outgoing, error) = *refused;
            outgoing.answer.take_back();
            self.waiting.push_front(Item::Publish(outgoing));
            session.fail(error);
        }
    }

    /// Answers what has been confirmed: the oldest message last. Who sends many waits for the oldest, and then finds the
    /// others answered and fills the whole window at once. Woken by the first of many answers it would send a single message
    /// ahead, for which the broker writes to its disk as it does for all the others together.
    async fn settle(&mut self, session: &mut Session) {
        let mut confirms = Vec::new();
        loop {
            let more = self.written.certain(&session.channel);
            if more.is_empty() {
                break;
            }
            confirms.extend(more);
        }
        confirms.sort_unstable_by_key(|(sequence, _)| Reverse(*sequence));
        for (sequence, result) in confirms {
            match result {
                Ok(confirmation) => self.confirmed(session, sequence, confirmation.is_nack()).await,
                // The rest of the channel fails with it, together.
                Err(error) => session.fail(error),
            }
        }
        self.answer_flushes();
    }

    async fn confirmed(&mut self, session: &mut Session, sequence: u64, nack: bool) {
        let Some(Entry { outgoing, returned, delay, .. }) = self.written.take(sequence) else { return };
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
            session.outlive(&outgoing, delay).await.map(|()| outgoing.message.id().cloned())
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

    /// The channel has ended: what was written and not confirmed gets its answer, or is written again.
    fn fail_written(&mut self, session: &Session) {
        let reason = match &session.failure {
            Some(error) if self.link.is_up() => error::text(error),
            _ => self.link.reason().to_string(),
        };
        let written = self.written.abandon();
        let refusal = session.failure.as_ref().filter(|error| error::is_channel_only(error));
        let fates = match refusal {
            Some(error) => refused::fates(error, &written),
            None => vec![Fate::Unknown; written.len()],
        };
        let mut unread = Vec::new();
        for (Entry { outgoing, .. }, fate) in written.into_iter().zip(fates) {
            if fate != Fate::Unknown {
                outgoing.route.ensured.store(0, Ordering::Release);
            }
            let error = match (fate, refusal) {
                (Fate::Unread, _) => {
                    unread.push(outgoing);
                    continue;
                }
                (Fate::Refused, Some(error)) => blame(error, &outgoing.route),
                (Fate::Suspect, Some(error)) => {
                    error::native("send", error.clone(), Stage::Operation).with_retry(Retry::UnknownOutcome)
                }
                _ => error::unknown("send", &reason),
            };
            let error = error.with_channel(&*outgoing.route.routing_key);
            outgoing.answer.complete(Err(error));
        }
        if !unread.is_empty() {
            self.write_again(unread);
        }
        self.answer_flushes();
        if !session.channel.status().connected() && refusal.is_none() {
            self.link.suspect();
        }
    }

    /// Puts messages that the broker has not looked at in front of what waits, and flushes of them behind them.
    fn write_again(&mut self, unread: Vec<Outgoing>) {
        self.held += self.flushes.len();
        for (_, done) in self.flushes.drain(..).rev() {
            self.waiting.push_front(Item::Flush(done));
        }
        for outgoing in unread.into_iter().rev() {
            outgoing.answer.take_back();
            self.waiting.push_front(Item::Publish(outgoing));
        }
    }
}

/// A channel of the next connection whose broker takes messages, tried for until there is one: none is opened while the
/// broker reads nothing. An error when there will be no connection any more.
async fn opened(link: Arc<LinkHandle>, config: Arc<AmqpConfig>) -> Result<Session> {
    loop {
        let live = link.unblocked().await?;
        let opened = timeout(config.connect_timeout, Session::open(Arc::clone(&link), Arc::clone(&config), live)).await;
        match opened.unwrap_or_else(|_| Err(error::timeout("send"))) {
            Ok(session) => return Ok(session),
            Err(error) => tracing::debug!(%error, "cannot open a channel, trying again"),
        }
        sleep(RETRY_AFTER).await;
    }
}

/// The broker's words about the one message that they can be about.
fn blame(error: &lapin::Error, route: &Route) -> Error {
    let error = error::native("send", error.clone(), Stage::Operation);
    // An exchange of ours is made again for the next message.
    let made_again = error.kind() == ErrorKind::NotFound && route.declare_exchange;
    if made_again { error.with_retry(Retry::Now) } else { error }
}
