//! Settling: what an acknowledgement and a return are in KubeMQ.
//!
//! The broker does not answer a settlement that it takes. An acknowledgement is done when it is handed over; when the
//! connection ends before the broker has it, the message comes again, as it does when the process ends right before it.

use std::{sync::Arc, time::Duration};

use polymq_core::{ATTEMPT, Completer, Completion, Error, Message, Settler, Token};

use crate::{
    NAME,
    convert::{self, MAX_SECONDS},
    held::Held,
    outbox::Answer,
    shared::{Shared, Verb},
};

/// From how many deliveries on a return is a copy: servers give a message up that they have delivered 1024 times.
const MANY: u32 = 1000;

/// The settler of one consumer.
#[derive(Debug)]
pub(crate) struct KubeMqSettler(pub(crate) Arc<Shared>);

impl Settler for KubeMqSettler {
    fn ack(&self, token: Token) -> Completion<()> {
        Completion::ready(self.0.acknowledge(&[token]))
    }

    fn ack_many(&self, tokens: &[Token]) -> Completion<()> {
        Completion::ready(self.0.acknowledge(tokens))
    }

    fn release(&self, token: Token, message: Message) {
        let Some(message) = self.0.keep(token, message) else { return };
        // Nobody hears of an error: a stream that has ended has returned the message already.
        if let Ok(held) = self.0.claim(token) {
            release(&self.0, held, message);
        }
    }

    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        if after > Duration::from_secs(MAX_SECONDS) {
            let what = format!("a retry delay of {after:?}, at most {MAX_SECONDS} s are possible");
            return Completion::ready(Err(Error::unsupported(NAME, what)));
        }
        let held = match self.0.claim(token) {
            Ok(held) => held,
            Err(error) => return Completion::ready(Err(error)),
        };
        // The broker would drop what is returned now.
        let is_last = held.dropped_after > 0 && held.count >= held.dropped_after;
        if after.is_zero() && held.system == *message.system_headers() {
            let verb = match attempt.checked_sub(held.attempt) {
                Some(0) if held.count == 1 => Some(Verb::Requeue),
                Some(1) if held.count < MANY && !is_last => Some(Verb::Nack),
                _ => None,
            };
            if let Some(verb) = verb {
                let told = self.0.order(verb, held);
                return Completion::ready(if told { Ok(()) } else { Err(crate::error::stale()) });
            }
        }
        let (completer, completion) = Completion::queued();
        copy(&self.0, held, message.clone(), (attempt, after), Some((token, completer)));
        completion
    }
}

impl Drop for KubeMqSettler {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// Back to the queue without counting an attempt: in its place where the server can, as new where that is the same, else a
/// copy goes back that says how many attempts there were.
pub(crate) fn release(shared: &Arc<Shared>, held: Held, message: Message) {
    if shared.returns() && held.system == *message.system_headers() {
        shared.order(Verb::Return, held);
        return;
    }
    if held.count == 1 && held.system == *message.system_headers() {
        shared.order(Verb::Requeue, held);
        return;
    }
    let attempt = held.attempt;
    copy(shared, held, message, (attempt, Duration::ZERO), None);
}

/// Puts a copy behind the others, or for later. The original is given up when its successor is safe.
fn copy(
    shared: &Arc<Shared>,
    held: Held,
    mut message: Message,
    (attempt, after): (u32, Duration),
    answer: Option<(Token, Completer<()>)>,
) {
    message = message.without_deliver_at();
    if attempt > 1 || message.system_headers().get(ATTEMPT).is_some() {
        message.set_system_header(ATTEMPT, attempt.to_string());
    }
    let mut copy = convert::queued(&message, &shared.queue, &shared.client_id, after);
    if let (Some(wanted), Some(policy)) = (&held.policy, &mut copy.policy) {
        policy.max_receive_count = wanted.max_receive_count;
        policy.max_receive_queue.clone_from(&wanted.max_receive_queue);
    }
    let then = {
        let shared = Arc::clone(shared);
        move |sent: polymq_core::Result<()>| match (sent, answer) {
            (Ok(()), answer) => {
                // Where its stream has ended, the message comes again beside its copy.
                let told = shared.order(Verb::Ack, held);
                if let Some((_, answer)) = answer {
                    answer.complete(if told { Ok(()) } else { Err(crate::error::stale()) });
                }
            }
            (Err(error), Some((token, answer))) => {
                shared.unclaim(token, held);
                answer.complete(Err(error.with_operation("settle")));
            }
            // Counted once more than it should be, which is better than held for ever.
            (Err(_), None) => drop(shared.order(Verb::Nack, held)),
        }
    };
    shared.outbox.push(copy, Answer::Then(Box::new(then)));
}
