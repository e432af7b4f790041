//! Messages of a link that wait for a connection, or for room in the window.

use std::{
    collections::VecDeque,
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use crate::link::Sending;

/// How many messages may wait before withdrawn ones are looked for among them.
const SWEEP_FROM: usize = 1024;
/// How often they are looked for while somebody waits for a flush.
const SWEEP_EVERY: Duration = Duration::from_millis(500);

/// What was handed over to be sent, in order.
pub(crate) struct Backlog {
    incoming: mpsc::UnboundedReceiver<Sending>,
    /// Came while nothing could be sent.
    held: VecDeque<Sending>,
    /// Flushes in `held`: somebody waits for messages that may be withdrawn meanwhile.
    flushes: usize,
    sweep_at: usize,
    swept: Instant,
    /// Messages that were not taken yet.
    waiting: Arc<AtomicUsize>,
}

impl Backlog {
    pub(crate) fn new(incoming: mpsc::UnboundedReceiver<Sending>, waiting: Arc<AtomicUsize>) -> Self {
        Self { incoming, held: VecDeque::new(), flushes: 0, sweep_at: SWEEP_FROM, swept: Instant::now(), waiting }
    }

    /// The next one, waited for; `None` when there will be none any more.
    pub(crate) async fn next(&mut self) -> Option<Sending> {
        let next = match self.pop() {
            Some(next) => next,
            None => self.incoming.recv().await?,
        };
        Some(self.taken(next))
    }

    /// The next one, if it is at hand.
    pub(crate) fn try_next(&mut self) -> Option<Sending> {
        let next = self.pop().or_else(|| self.incoming.try_recv().ok())?;
        Some(self.taken(next))
    }

    /// While nothing can be sent: keeps what comes next, or drops what was withdrawn, so that an outage of an hour does not
    /// hold an hour of messages.
    pub(crate) async fn hold(&mut self) {
        let looks = self.flushes > 0;
        tokio::select! {
            next = self.incoming.recv() => match next {
                Some(next) => self.keep(next),
                // Whoever awaits this hears of the end elsewhere.
                None => pending().await,
            },
            () = sleep_until(self.swept + SWEEP_EVERY), if looks => self.sweep(),
        }
    }

    /// Takes no more.
    pub(crate) fn close(&mut self) {
        self.incoming.close();
    }

    fn pop(&mut self) -> Option<Sending> {
        let next = self.held.pop_front()?;
        self.flushes -= usize::from(matches!(next, Sending::Flush(_)));
        Some(next)
    }

    fn taken(&self, next: Sending) -> Sending {
        if matches!(next, Sending::Message(_)) {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        next
    }

    fn keep(&mut self, next: Sending) {
        let flush = matches!(next, Sending::Flush(_));
        self.flushes += usize::from(flush);
        self.held.push_back(next);
        if flush || self.held.len() >= self.sweep_at {
            self.sweep();
        }
    }

    /// Drops withdrawn messages, and answers flushes that wait for nothing else: what was written before has its answer since
    /// the connection ended.
    fn sweep(&mut self) {
        let before = self.held.len();
        self.held.retain(|next| !matches!(next, Sending::Message(message) if !message.answer.is_awaited()));
        self.waiting.fetch_sub(before - self.held.len(), Ordering::Relaxed);
        while matches!(self.held.front(), Some(Sending::Flush(_)))
            && let Some(Sending::Flush(done)) = self.pop()
        {
            let _ = done.send(());
        }
        (self.sweep_at, self.swept) = ((self.held.len() * 2).max(SWEEP_FROM), Instant::now());
    }
}
