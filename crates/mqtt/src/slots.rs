//! Packet ids that are lent, and who waits for their answers.

use std::{collections::VecDeque, sync::Arc};

use polymq_core::{Completer, Error, ErrorKind, MessageId, Receipt, Result};
use rumqttc::v5::mqttbytes::{QoS, v5::PubAckReason};
use tokio::sync::oneshot;

use crate::{
    declared::{self, Queue},
    error::{error, refused_publish},
};

/// Who waits for the answer to a message.
pub(crate) enum Answer {
    /// A producer. To a queue, a message that no session holds is an error.
    Receipt {
        completer: Completer<Receipt>,
        id: MessageId,
        queue: Option<Arc<Queue>>,
    },
    /// Someone who wants the reason itself.
    Reason(oneshot::Sender<Result<PubAckReason>>),
    Nobody,
}

impl Answer {
    /// Just before writing; `false` when the sender has withdrawn the message.
    pub(crate) fn hand_over(&self) -> bool {
        match self {
            Self::Receipt { completer, .. } => completer.hand_over(),
            Self::Reason(_) | Self::Nobody => true,
        }
    }

    /// Whether the sender has not withdrawn the message.
    pub(crate) fn is_awaited(&self) -> bool {
        !matches!(self, Self::Receipt { completer, .. } if completer.is_abandoned())
    }

    /// Why the message must not be written now, if so.
    pub(crate) fn forbidden(&self) -> Option<Error> {
        match self {
            Self::Receipt { queue: Some(queue), .. } if queue.would_be_lost() => Some(declared::not_there()),
            _ => None,
        }
    }

    pub(crate) fn give(self, reason: PubAckReason) {
        match self {
            Self::Receipt { completer, id, queue } => match (refused_publish(reason, queue.is_some()), queue) {
                (None, _) => completer.complete(Ok(Receipt { id, broker_id: None })),
                (Some(refused), Some(queue)) if refused.kind() == ErrorKind::Unroutable => {
                    queue.unheld(completer, refused)
                }
                (Some(refused), _) => completer.complete(Err(refused)),
            },
            Self::Reason(waits) => {
                let _ = waits.send(Ok(reason));
            }
            Self::Nobody => {}
        }
    }

    pub(crate) fn fail(self, error: Error) {
        match self {
            Self::Receipt { completer, .. } => completer.complete(Err(error)),
            Self::Reason(waits) => {
                let _ = waits.send(Err(error));
            }
            Self::Nobody => {}
        }
    }
}

/// What a packet id was lent for.
pub(crate) enum Slot {
    Publish {
        answer: Answer,
        /// QoS 2: the reason of PUBREC while PUBCOMP is awaited.
        received: Option<PubAckReason>,
    },
    Subscribe {
        asked: QoS,
        /// Nobody waits when a link subscribes again by itself.
        answer: Option<oneshot::Sender<Result<()>>>,
    },
    Unsubscribe(oneshot::Sender<Result<()>>),
}

struct Lent {
    slot: Slot,
    /// The flush that this belongs to; see [`Slots::when_answered`].
    epoch: u64,
}

/// The packet ids of one connection.
#[derive(Default)]
pub(crate) struct Slots {
    /// By packet id minus one; grows as far as ids are needed at once.
    lent: Vec<Option<Lent>>,
    free: Vec<u16>,
    publishing: usize,
    window: usize,
    /// QoS 0 messages and flushes, answered when the socket has taken them.
    written: Vec<Answer>,
    flushes: Vec<oneshot::Sender<()>>,
    pings: VecDeque<oneshot::Sender<Result<()>>>,
    /// Unanswered messages by epoch, oldest first; each epoch but the last ends with a waiter.
    unanswered: VecDeque<usize>,
    waiters: VecDeque<oneshot::Sender<()>>,
    first_epoch: u64,
}

/// Packets for one turn. More of them save system calls, but then broker and client wait for each other instead of
/// working at once: with 128, half the throughput was lost.
const CHUNK: usize = 16;

/// Ids that messages must leave to subscriptions.
const RESERVED: usize = 64;

impl Slots {
    /// A connection begins, whose broker takes this many unanswered messages.
    pub(crate) fn begin(&mut self, receive_maximum: u16) {
        self.window = usize::from(receive_maximum).min(usize::from(u16::MAX) - RESERVED);
    }

    /// Whether one more message may be sent.
    pub(crate) fn has_room(&self) -> bool {
        self.publishing < self.window
    }

    /// How many messages to write, or answers to read, before the other side gets its turn.
    pub(crate) fn chunk(&self) -> usize {
        (self.window / 8).clamp(1, CHUNK)
    }

    /// Lends a packet id. `None`, after telling who waits, when there is none: more subscriptions at once than the
    /// protocol has ids.
    pub(crate) fn lend(&mut self, slot: Slot) -> Option<u16> {
        let pkid = match self.free.pop() {
            Some(pkid) => pkid,
            None if self.lent.len() < usize::from(u16::MAX) => {
                self.lent.push(None);
                self.lent.len() as u16
            }
            None => {
                fail(slot, || error(ErrorKind::Busy, "no packet id is free"));
                return None;
            }
        };
        if matches!(slot, Slot::Publish { .. }) {
            self.publishing += 1;
            match self.unanswered.back_mut() {
                Some(count) => *count += 1,
                None => self.unanswered.push_back(1),
            }
        }
        let epoch = self.first_epoch + self.unanswered.len().saturating_sub(1) as u64;
        self.lent[usize::from(pkid) - 1] = Some(Lent { slot, epoch });
        Some(pkid)
    }

    /// Takes a packet id back.
    pub(crate) fn take(&mut self, pkid: u16) -> Option<Slot> {
        let lent = self.lent.get_mut(usize::from(pkid).checked_sub(1)?)?.take();
        let Some(Lent { slot, epoch }) = lent else {
            tracing::debug!(pkid, "an answer that nobody waits for");
            return None;
        };
        self.free.push(pkid);
        if matches!(slot, Slot::Publish { .. }) {
            self.publishing -= 1;
            if let Some(count) = self.unanswered.get_mut((epoch - self.first_epoch) as usize) {
                *count -= 1;
            }
            self.wake();
        }
        Some(slot)
    }

    /// PUBACK.
    pub(crate) fn answer(&mut self, pkid: u16, reason: PubAckReason) {
        if let Some(Slot::Publish { answer, .. }) = self.take(pkid) {
            answer.give(reason);
        }
    }

    /// PUBREC; `true` when PUBREL must follow.
    pub(crate) fn received(&mut self, pkid: u16, reason: PubAckReason) -> bool {
        let refused = !matches!(reason, PubAckReason::Success | PubAckReason::NoMatchingSubscribers);
        if refused {
            self.answer(pkid, reason);
            return false;
        }
        let lent = usize::from(pkid).checked_sub(1).and_then(|at| self.lent.get_mut(at)?.as_mut());
        if let Some(Lent { slot: Slot::Publish { received, .. }, .. }) = lent {
            *received = Some(reason);
        }
        true
    }

    /// PUBCOMP.
    pub(crate) fn complete(&mut self, pkid: u16) {
        if let Some(Slot::Publish { answer, received }) = self.take(pkid) {
            answer.give(received.unwrap_or(PubAckReason::Success));
        }
    }

    /// A message without an answer was written.
    pub(crate) fn unanswered(&mut self, answer: Answer) {
        self.written.push(answer);
    }

    /// `done` when everything written so far is with the socket.
    pub(crate) fn when_flushed(&mut self, done: oneshot::Sender<()>) {
        self.flushes.push(done);
    }

    pub(crate) fn unflushed(&self) -> bool {
        !self.flushes.is_empty() || !self.written.is_empty()
    }

    /// The socket has taken everything.
    pub(crate) fn flushed(&mut self) {
        for answer in self.written.drain(..) {
            answer.give(PubAckReason::Success);
        }
        for done in self.flushes.drain(..) {
            let _ = done.send(());
        }
    }

    /// `done` when every message sent so far is answered, whatever is sent later.
    pub(crate) fn when_answered(&mut self, done: oneshot::Sender<()>) {
        if self.unanswered.is_empty() {
            self.unanswered.push_back(0);
        }
        self.waiters.push_back(done);
        self.unanswered.push_back(0);
        self.wake();
    }

    fn wake(&mut self) {
        while self.unanswered.front() == Some(&0) {
            let Some(done) = self.waiters.pop_front() else { return };
            self.unanswered.pop_front();
            self.first_epoch += 1;
            let _ = done.send(());
        }
    }

    pub(crate) fn ping(&mut self, answer: oneshot::Sender<Result<()>>) {
        self.pings.push_back(answer);
    }

    pub(crate) fn pong(&mut self) {
        // An answer to the keep-alive counts too: either way, the broker has answered since.
        if let Some(waits) = self.pings.pop_front() {
            let _ = waits.send(Ok(()));
        }
    }

    /// The connection ended: nothing that was handed over will be answered.
    pub(crate) fn lose(&mut self, reason: &str) {
        let unknown = || {
            error(ErrorKind::UnknownOutcome, format!("the connection ended before the broker answered: {reason}"))
                .with_operation("send")
        };
        for lent in self.lent.drain(..).flatten() {
            match lent.slot {
                slot @ Slot::Publish { .. } => fail(slot, unknown),
                slot => fail(slot, || error(ErrorKind::Disconnected, format!("connection lost: {reason}"))),
            }
        }
        for answer in self.written.drain(..) {
            answer.fail(unknown());
        }
        for waits in self.pings.drain(..) {
            let _ = waits.send(Err(error(ErrorKind::Disconnected, format!("connection lost: {reason}"))));
        }
        for done in self.flushes.drain(..).chain(self.waiters.drain(..)) {
            let _ = done.send(());
        }
        self.free.clear();
        self.unanswered.clear();
        self.publishing = 0;
    }
}

fn fail(slot: Slot, make: impl FnOnce() -> Error) {
    match slot {
        Slot::Publish { answer, .. } => answer.fail(make()),
        Slot::Subscribe { answer: Some(waits), .. } | Slot::Unsubscribe(waits) => {
            let _ = waits.send(Err(make()));
        }
        Slot::Subscribe { answer: None, .. } => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish() -> (Slot, oneshot::Receiver<Result<PubAckReason>>) {
        let (answer, answered) = oneshot::channel();
        (Slot::Publish { answer: Answer::Reason(answer), received: None }, answered)
    }

    #[test]
    fn ids_come_back_in_any_order_and_are_never_lent_twice() {
        let mut slots = Slots::default();
        slots.begin(3);
        let ids: Vec<_> = (0..3).filter_map(|_| slots.lend(publish().0)).collect();
        assert_eq!(ids, [1, 2, 3]);
        assert!(!slots.has_room());
        slots.answer(2, PubAckReason::Success);
        assert!(slots.has_room());
        assert_eq!(slots.lend(publish().0), Some(2));
        slots.answer(9, PubAckReason::Success);
        slots.answer(0, PubAckReason::Success);
    }

    #[test]
    fn a_refused_qos_2_message_gives_its_place_back() {
        let mut slots = Slots::default();
        slots.begin(1);
        let (slot, mut answered) = publish();
        let pkid = slots.lend(slot).expect("free");
        assert!(!slots.received(pkid, PubAckReason::NotAuthorized));
        assert!(matches!(answered.try_recv(), Ok(Ok(PubAckReason::NotAuthorized))));
        assert!(slots.has_room());
        let (slot, mut answered) = publish();
        let pkid = slots.lend(slot).expect("free");
        assert!(slots.received(pkid, PubAckReason::NoMatchingSubscribers));
        assert!(answered.try_recv().is_err() && !slots.has_room());
        slots.complete(pkid);
        assert!(matches!(answered.try_recv(), Ok(Ok(PubAckReason::NoMatchingSubscribers))));
    }

    #[test]
    fn a_flush_waits_for_what_was_sent_before_only() {
        let mut slots = Slots::default();
        slots.begin(10);
        let (first, mut first_done) = oneshot::channel();
        slots.when_answered(first);
        assert!(first_done.try_recv().is_ok(), "nothing was sent");
        let early = slots.lend(publish().0).expect("free");
        let (second, mut second_done) = oneshot::channel();
        slots.when_answered(second);
        let late = slots.lend(publish().0).expect("free");
        slots.answer(late, PubAckReason::Success);
        assert!(second_done.try_recv().is_err());
        slots.answer(early, PubAckReason::Success);
        assert!(second_done.try_recv().is_ok());
    }

    #[test]
    fn a_lost_connection_answers_everything_once() {
        let mut slots = Slots::default();
        slots.begin(10);
        let (slot, mut answered) = publish();
        slots.lend(slot);
        let (written, mut written_answered) = oneshot::channel();
        slots.unanswered(Answer::Reason(written));
        slots.lose("gone");
        for answered in [&mut answered, &mut written_answered] {
            let error = answered.try_recv().expect("answered").expect_err("failed");
            assert_eq!(error.kind(), ErrorKind::UnknownOutcome);
        }
        slots.begin(1);
        assert_eq!(slots.lend(publish().0), Some(1));
    }
}
