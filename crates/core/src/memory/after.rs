use std::sync::Arc;

use tokio::sync::oneshot;

use super::{channel::Channel, settle::Share};
use crate::{Completer, Message, Receipt, Result};

/// What is done after the lock was given back, because waking runs code of others. Small while there is nothing
/// but one consumer to wake.
#[derive(Default)]
pub(super) struct After {
    wake: Option<Arc<Share>>,
    rest: Option<Box<Rest>>,
}

#[derive(Default)]
pub(super) struct Rest {
    pub(super) wake: Vec<Arc<Share>>,
    pub(super) deleted: Vec<Arc<Share>>,
    pub(super) answers: Vec<(Completer<Receipt>, Result<Receipt>)>,
    pub(super) flushed: Vec<oneshot::Sender<()>>,
    pub(super) discarded: Vec<Message>,
    /// Topics whose senders may have waited for room here.
    pub(super) feeders: Vec<Arc<Channel>>,
}

impl After {
    #[inline]
    pub(super) fn wake(&mut self, share: Arc<Share>) {
        match self.wake {
            None => self.wake = Some(share),
            Some(_) => self.rest().wake.push(share),
        }
    }

    pub(super) fn discard(&mut self, messages: impl Iterator<Item = Message>) {
        self.rest().discarded.extend(messages);
    }

    pub(super) fn rest(&mut self) -> &mut Rest {
        self.rest.get_or_insert_default()
    }

    #[inline]
    pub(super) fn run(self) {
        if let Some(share) = self.wake {
            share.wake();
        }
        if let Some(rest) = self.rest {
            rest.run();
        }
    }
}

impl Rest {
    #[cold]
    fn run(self) {
        self.wake.iter().for_each(|share| share.wake());
        self.deleted.iter().for_each(|share| share.delete());
        self.answers.into_iter().for_each(|(completer, result)| completer.complete(result));
        for done in self.flushed {
            // Whoever flushed may have stopped waiting.
            let _ = done.send(());
        }
        self.feeders.iter().for_each(|topic| topic.admit());
    }
}
