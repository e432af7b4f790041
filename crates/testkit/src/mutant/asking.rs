//! Mutants that lose, mix up and repeat replies.

use std::sync::{Arc, Mutex};

use polymq_core::{Completion, Message, REPLY_ERROR, Receipt};

use super::{Mutant, mutant};
use crate::{
    cx::lock,
    twist::{Sending, Twist},
};

pub(super) const MUTANTS: &[Mutant] = &[
    mutant("loses_replies", || Arc::new(LosesReplies), &["Q1_answer"]),
    mutant("forgets_that_a_reply_is_an_error", || Arc::new(ForgetsErrors), &["Q2_error_reply"]),
    mutant("repeats_replies", || Arc::new(RepeatsReplies), &["Q3_late_reply"]),
    mutant("crosses_replies", || Arc::new(CrossesReplies::default()), &["Q4_many_at_once"]),
    mutant("forgets_who_asked_when_it_retries", || Arc::new(ForgetsWhoAsked), &["Q5_answer_of_a_later_attempt"]),
];

/// Whether this goes to somebody who asked.
fn is_reply(at: &Sending) -> bool {
    at.address.name().starts_with("polymq-reply-")
}

fn taken(message: &Message) -> Completion<Receipt> {
    let id = message.id().cloned().unwrap_or_default();
    Completion::ready(Ok(Receipt { id, broker_id: None }))
}

#[derive(Debug)]
struct LosesReplies;

impl Twist for LosesReplies {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if is_reply(at) { taken(&message) } else { at.producer.send(message) }
    }
}

#[derive(Debug)]
struct ForgetsErrors;

impl Twist for ForgetsErrors {
    fn send(&self, at: &Sending, mut message: Message) -> Completion<Receipt> {
        if message.system_headers().get(REPLY_ERROR).is_some() {
            message.clear_system_headers();
        }
        at.producer.send(message)
    }
}

#[derive(Debug)]
struct RepeatsReplies;

impl Twist for RepeatsReplies {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if is_reply(at) {
            drop(at.producer.send(message.clone()));
        }
        at.producer.send(message)
    }
}

/// Gives each reply the correlation id of the one before.
#[derive(Debug, Default)]
struct CrossesReplies(Mutex<Option<String>>);

impl Twist for CrossesReplies {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if !is_reply(at) {
            return at.producer.send(message);
        }
        let own = message.correlation_id().map(str::to_owned);
        match std::mem::replace(&mut *lock(&self.0), own) {
            Some(other) => at.producer.send(message.with_correlation_id(other)),
            None => taken(&message),
        }
    }
}

/// A retried request has no reply address any more.
#[derive(Debug)]
struct ForgetsWhoAsked;

impl Twist for ForgetsWhoAsked {
    fn retry(
        &self,
        at: &crate::twist::Receiving,
        token: polymq_core::Token,
        message: &Message,
        attempt: u32,
        after: std::time::Duration,
    ) -> Completion<()> {
        let copy = Message::new(message.payload().clone());
        let copy = match message.content_type() {
            Some(content_type) => copy.with_content_type(content_type.to_owned()),
            None => copy,
        };
        at.settler.retry(token, &copy, attempt, after)
    }
}
