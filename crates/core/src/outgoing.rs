//! Messages that are handed to a backend together.

use std::collections::VecDeque;

use crate::{Incoming, Message, Token};

/// Messages to be sent together, in their order. They are kept as they are delivered, so that a backend which passes
/// them on inside this process moves them without looking.
#[derive(Debug, Default)]
pub struct Outgoing(pub(crate) VecDeque<Incoming>);

impl Outgoing {
    /// How many are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The messages that are left.
    pub fn iter(&self) -> impl Iterator<Item = &Message> {
        self.0.iter().map(|entry| &entry.message)
    }

    /// Takes the first one out.
    pub fn pop(&mut self) -> Option<Message> {
        self.0.pop_front().map(|entry| entry.message)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Message> {
        self.0.iter_mut().map(|entry| &mut entry.message)
    }

    pub(crate) fn extend(&mut self, messages: impl Iterator<Item = Message>) {
        self.0.extend(messages.map(|message| Incoming::new(message, Token::default())));
    }
}
