//! Messages that were written to a channel and are not confirmed.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    BasicProperties, Channel, Confirmation, message::BasicReturnMessage, options::BasicPublishOptions,
    types::ShortString,
};
use polymq_core::MessageId;

use crate::{pool::Outgoing, session::Delay};

/// What may be unconfirmed on one channel. A broker that confirms nothing, or does not even read, would otherwise fill this
/// machine's memory: whoever sent a message waits for a while only, and sends the next.
const MAX_BYTES: usize = 64 * 1024 * 1024;
const MAX_MESSAGES: usize = 64 * 1024;
/// What the frames of a message take besides its body, about.
const FRAMES_BYTES: usize = 200;

/// Sequence number and confirm of a message.
pub(crate) type Confirm = (u64, lapin::Result<Confirmation>);

/// Where one message goes, in the words of the client library.
pub(crate) struct Target {
    pub(crate) exchange: ShortString,
    pub(crate) routing_key: ShortString,
    pub(crate) mandatory: bool,
    pub(crate) properties: BasicProperties,
}

impl Target {
    fn publish(self, channel: Arc<Channel>, payload: Bytes, sequence: u64) -> BoxFuture<'static, Confirm> {
        let Self { exchange, routing_key, mandatory, properties } = self;
        let options = BasicPublishOptions { mandatory, ..BasicPublishOptions::default() };
        Box::pin(async move {
            let written = channel.basic_publish(exchange, routing_key, options, &payload, properties).await;
            let confirmed = match written {
                Ok(confirm) => confirm.await,
                Err(error) => Err(error),
            };
            (sequence, confirmed)
        })
    }
}

/// How much a message takes on the wire, about.
pub(crate) fn weight(outgoing: &Outgoing) -> usize {
    outgoing.message.payload().len() + FRAMES_BYTES
}

/// A message, written and not confirmed.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) outgoing: Outgoing,
    /// The broker's reason for having returned it.
    pub(crate) returned: Option<String>,
    /// The delay of its delay queue, and when that was declared.
    pub(crate) delay: Option<Delay>,
    /// The delay queue that it was written to instead of where it goes.
    waits_in: Option<ShortString>,
}

impl Entry {
    pub(crate) fn new(outgoing: Outgoing, delay: Option<Delay>) -> Self {
        Self { outgoing, returned: None, delay, waits_in: None }
    }

    /// Exchange and routing key that it was written with.
    pub(crate) fn place(&self) -> (&str, &str) {
        match &self.waits_in {
            Some(queue) => ("", queue.as_str()),
            None => (&self.outgoing.route.exchange, &self.outgoing.route.routing_key),
        }
    }
}

/// A waker that keeps in mind that it was woken.
#[derive(Debug, Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// What is unconfirmed on one channel, in the order of writing. Confirms come in any order.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    /// By sequence number from `base` on.
    entries: VecDeque<Option<Entry>>,
    base: u64,
    /// What they take together.
    bytes: usize,
    confirms: FuturesUnordered<BoxFuture<'static, Confirm>>,
    /// Confirmed, and not yet certain whether returned before.
    ready: Vec<Confirm>,
}

impl InFlight {
    /// Writes a message; its error is what was refused before a single byte was queued.
    ///
    /// The first poll hands the frames to the connection, so the order of calls is the order on the wire. It does not
    /// wait for the socket: many messages go out with one system call.
    pub(crate) fn write(
        &mut self,
        channel: &Arc<Channel>,
        target: Target,
        mut entry: Entry,
    ) -> Result<(), Box<(Outgoing, lapin::Error)>> {
        if target.routing_key.as_str() != &*entry.outgoing.route.routing_key {
            entry.waits_in = Some(target.routing_key.clone());
        }
        let mut confirm = target.publish(Arc::clone(channel), entry.outgoing.message.payload().clone(), self.next());
        match confirm.poll_unpin(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready((_, Err(error))) => return Err(Box::new((entry.outgoing, error))),
            Poll::Ready(confirm) => self.ready.push(confirm),
            Poll::Pending => self.confirms.push(confirm),
        }
        self.bytes += weight(&entry.outgoing);
        self.entries.push_back(Some(entry));
        Ok(())
    }

    /// The sequence number of the next message.
    pub(crate) fn next(&self) -> u64 {
        self.base + self.entries.len() as u64
    }

    /// The sequence number of the oldest unanswered message, or of the next one.
    pub(crate) fn oldest(&self) -> u64 {
        self.base
    }

    pub(crate) fn is_pending(&self) -> bool {
        !self.confirms.is_empty()
    }

    /// Whether nothing more is to be written before something is confirmed.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes >= MAX_BYTES || self.confirms.len() >= MAX_MESSAGES
    }

    /// Waits for a confirm.
    pub(crate) async fn confirm(&mut self) {
        if let Some(confirm) = self.confirms.next().await {
            self.ready.push(confirm);
        }
    }

    /// Confirms that can be believed.
    ///
    /// The client library hands a returned message to whichever confirm it reads next, which with many in flight is
    /// often another message's. So returned messages are matched here, and a confirm only counts when it is certain
    /// that no return is still on its way from the library: the library settles a whole acknowledgement under one
    /// lock, hence what is ready before that lock was seen free is complete after it.
    pub(crate) fn certain(&mut self, channel: &Channel) -> Vec<Confirm> {
        self.drain();
        let certain = self.ready.len();
        if certain == 0 {
            return Vec::new();
        }
        // Takes the lock and returns at once; there is no other way to it.
        let _ = channel.wait_for_confirms().now_or_never();
        self.drain();
        for at in 0..self.ready.len() {
            let (carrier, result) = &mut self.ready[at];
            if let Ok(Confirmation::Ack(message) | Confirmation::Nack(message)) = result {
                let carrier = *carrier;
                if let Some(message) = message.take() {
                    self.returned(carrier, &message);
                }
            }
        }
        self.ready.drain(..certain).collect()
    }

    /// Moves everything that is ready. The set also stops short with something ready left, so as not to keep its task from
    /// others; it wakes the task then.
    fn drain(&mut self) {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        loop {
            match self.confirms.poll_next_unpin(&mut Context::from_waker(&waker)) {
                Poll::Ready(Some(confirm)) => self.ready.push(confirm),
                Poll::Pending if woken.0.swap(false, Ordering::AcqRel) => {}
                Poll::Ready(None) | Poll::Pending => return,
            }
        }
    }

    fn returned(&mut self, carrier: u64, message: &BasicReturnMessage) {
        let id = message.properties.message_id().as_ref().map(|id| id.as_str());
        let place = (message.exchange.as_str(), message.routing_key.as_str());
        // The same message may be on its way to several queues.
        let found = self.entries.iter_mut().flatten().find(|entry| {
            let known = entry.outgoing.message.id().map(MessageId::to_string);
            entry.returned.is_none()
                && entry.place() == place
                && known.as_deref() == id
                && entry.outgoing.message.payload() == &message.data
        });
        let entry = match found {
            Some(entry) => Some(entry),
            // Better a false alarm than a loss.
            None => self.at(carrier).and_then(|at| self.entries[at].as_mut()),
        };
        if let Some(entry) = entry {
            entry.returned = Some(message.reply_text.to_string());
        }
    }

    fn at(&self, sequence: u64) -> Option<usize> {
        let at = usize::try_from(sequence.checked_sub(self.base)?).ok()?;
        (at < self.entries.len()).then_some(at)
    }

    /// Takes an answered message out.
    pub(crate) fn take(&mut self, sequence: u64) -> Option<Entry> {
        let at = self.at(sequence)?;
        let entry = self.entries[at].take();
        self.bytes -= entry.as_ref().map_or(0, |entry| weight(&entry.outgoing));
        while let Some(None) = self.entries.front() {
            self.entries.pop_front();
            self.base += 1;
        }
        entry
    }

    /// The channel has ended: takes everything out.
    pub(crate) fn abandon(&mut self) -> Vec<Entry> {
        self.base = self.next();
        self.bytes = 0;
        self.confirms.clear();
        self.ready.clear();
        self.entries.drain(..).flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, task::Poll};

    use super::*;

    #[test]
    fn what_is_ready_is_found_behind_what_has_to_be_asked_twice() {
        let mut written = InFlight::default();
        for sequence in 0..2 {
            let mut asked = false;
            written.confirms.push(Box::pin(poll_fn(move |context| {
                if std::mem::replace(&mut asked, true) {
                    return Poll::Ready((sequence, Ok(Confirmation::Ack(None))));
                }
                context.waker().wake_by_ref();
                Poll::Pending
            })));
        }
        written.confirms.push(Box::pin(async { (2, Ok(Confirmation::Ack(None))) }));
        written.confirms.push(Box::pin(std::future::pending()));
        written.drain();
        let mut ready: Vec<u64> = written.ready.iter().map(|(sequence, _)| *sequence).collect();
        ready.sort_unstable();
        assert_eq!(ready, [0, 1, 2]);
        assert!(written.is_pending());
    }
}
