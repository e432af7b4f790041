//! Settling: what an acknowledgement, a return and a longer loan are in SQS.
//!
//! An acknowledgement is done when it is handed over: it is sent with others, and again until SQS has answered or the loan
//! is over. If the process ends before, SQS delivers the message again, as it does when the process ends right before it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use polymq_core::{ATTEMPT, Completer, Completion, Error, Message, Result, Settler, Token};

use crate::{
    NAME,
    backend::MAX_SEND_DELAY,
    config::MAX_VISIBILITY,
    convert,
    outbox::Letter,
    producer::group,
    shared::{Copied, Held, Purpose, Shared},
};

/// The settler of one consumer.
#[derive(Debug)]
pub(crate) struct SqsSettler(pub(crate) Arc<Shared>);

impl Settler for SqsSettler {
    fn ack(&self, token: Token) -> Completion<()> {
        Completion::ready(self.0.acknowledge(&[token]))
    }

    fn ack_many(&self, tokens: &[Token]) -> Completion<()> {
        Completion::ready(self.0.acknowledge(tokens))
    }

    fn release(&self, token: Token, message: Message) {
        // Nobody hears of an error: a loan that is over has returned the message already.
        let _ = self.0.settle(token, |held| release(&self.0, held, message));
    }

    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        if after > MAX_VISIBILITY {
            let what = format!("a retry delay of {after:?}, at most {MAX_VISIBILITY:?} is possible");
            return Completion::ready(Err(Error::unsupported(NAME, what)));
        }
        let (completer, completion) = Completion::queued();
        match self.0.settle(token, |held| self.again(token, held, message, attempt, after, completer)) {
            Ok(()) => completion,
            Err(error) => Completion::ready(Err(error)),
        }
    }

    fn extend(&self, token: Token, by: Duration) -> Completion<()> {
        let (completer, completion) = Completion::queued();
        self.0.extend(token, convert::seconds(by.min(MAX_VISIBILITY)).max(1), completer);
        completion
    }
}

impl SqsSettler {
    fn again(&self, token: Token, held: Held, message: &Message, attempt: u32, after: Duration, answer: Completer<()>) {
        let counted = attempt == held.attempt.saturating_add(1);
        let same = held.system == *message.system_headers();
        if (same && counted) || !self.may_copy(&held, counted, after) {
            if !same {
                let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
                self.0.note(&held, message.system_headers().iter().map(own).collect());
            }
            return self.0.change(&held, convert::seconds(after), Purpose::Retry(answer));
        }
        match letter(&self.0, message.clone(), attempt, after) {
            Ok(letter) => self.0.copy(Copied { letter, held, answer: Some((token, answer)) }),
            Err(error) => {
                self.0.unclaim(token, held);
                answer.complete(Err(error));
            }
        }
    }

    /// Whether a copy may take the place of a message. Behind the others of its key is the right place for one that is put
    /// off, and the wrong one for one that is tried again. FIFO queues know no delay of a message.
    fn may_copy(&self, held: &Held, counted: bool, after: Duration) -> bool {
        if held.lossy {
            return false;
        }
        match (self.0.fifo, self.0.keeps_place(held)) {
            (false, keeps) => !keeps && after <= MAX_SEND_DELAY,
            (true, keeps) => after.is_zero() && (!keeps || !counted),
        }
    }
}

impl Drop for SqsSettler {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// Back to the queue without counting an attempt. SQS counts every delivery, so a copy goes back that says how many do
/// not count; where it would lose its place, the original goes back and the delivery counts.
pub(crate) fn release(shared: &Shared, held: Held, message: Message) {
    if shared.keeps_place(&held) {
        return shared.change(&held, 0, Purpose::Release);
    }
    match letter(shared, message, held.attempt, Duration::ZERO) {
        Ok(letter) => shared.copy(Copied { letter, held, answer: None }),
        Err(_) => shared.change(&held, 0, Purpose::Release),
    }
}

fn letter(shared: &Shared, message: Message, attempt: u32, after: Duration) -> Result<Letter> {
    let mut copy = message.without_deliver_at();
    if attempt > 1 || copy.system_headers().get(ATTEMPT).is_some() {
        copy.set_system_header(ATTEMPT, attempt.to_string());
    }
    let wire = convert::encode(&copy, shared.max_message)?;
    let id = copy.id().cloned().unwrap_or_default();
    let fifo = shared.fifo.then(|| {
        // Not the message's id: the queue has seen it, and would take the copy for a repetition.
        (group(&copy, &id), format!("{:032x}", fastrand::u128(..)))
    });
    let deliver_at = (!after.is_zero()).then(|| Instant::now() + after);
    Ok(Letter { id, wire, deliver_at, fifo, subject: None })
}
