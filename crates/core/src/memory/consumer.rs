use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use async_trait::async_trait;
use tokio::{
    task::coop,
    time::{Instant, Sleep, sleep_until},
};

use super::{connection::Link, queue::Taken, settle::Share};
use crate::{Consumer, Incoming, Result, Settler};

pub(super) struct MemoryConsumer {
    share: Arc<Share>,
    /// The connection's health lives as long as a handle does.
    _link: Arc<Link>,
    /// On the queue's list of those who wait, or taken off it by a wake-up that was not looked at yet.
    waits: bool,
    /// For the next delayed message.
    timer: Option<Pin<Box<Sleep>>>,
    closed: bool,
}

impl MemoryConsumer {
    pub(super) fn new(share: Arc<Share>, link: Arc<Link>) -> Self {
        Self { share, _link: link, waits: false, timer: None, closed: false }
    }

    fn poll_take(&mut self, max: usize, into: &mut Vec<Incoming>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.closed {
            return Poll::Ready(Err(self.share.channel().closed("receive")));
        }
        // A queue that is never empty must not keep other tasks of this thread from running.
        let budget = ready!(coop::poll_proceed(cx));
        loop {
            if let Err(error) = self.share.check() {
                budget.made_progress();
                return Poll::Ready(Err(error));
            }
            let room = self.share.room();
            if room.messages > 0 {
                let taken = self.share.channel().take(max, &self.share, into, cx.waker(), self.waits);
                self.waits = matches!(taken, Some(Taken::Nothing { .. }));
                match taken {
                    Some(Taken::Some) => {
                        budget.made_progress();
                        return Poll::Ready(Ok(()));
                    }
                    // Closed or deleted since: the wake-up for it may have come before there was a waker.
                    Some(Taken::Nothing { .. }) if self.share.check().is_err() => continue,
                    Some(Taken::Nothing { due }) => match self.poll_timer(due, cx) {
                        Poll::Ready(()) => continue,
                        Poll::Pending => return Poll::Pending,
                    },
                    Some(Taken::NoRoom) => {}
                    None => return Poll::Ready(Err(self.share.channel().missing("receive"))),
                }
            }
            if self.share.wait_for_room(&room, cx.waker()) {
                return Poll::Pending;
            }
        }
    }

    fn poll_timer(&mut self, due: Option<Instant>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(due) = due else {
            self.timer = None;
            return Poll::Pending;
        };
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        if timer.deadline() != due {
            timer.as_mut().reset(due);
        }
        timer.as_mut().poll(cx)
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.closed, true) {
            self.timer = None;
            self.share.channel().detach(&self.share, std::mem::take(&mut self.waits));
        }
    }
}

#[async_trait]
impl Consumer for MemoryConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        crate::consumer::receive(self, max, into).await
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, max: usize, into: &mut Vec<Incoming>) -> Option<Poll<Result<()>>> {
        Some(self.poll_take(max.max(1), into, cx))
    }

    /// One who waits no more gives its wake-up to another consumer.
    fn stop_receiving(&mut self) {
        if std::mem::take(&mut self.waits) {
            self.timer = None;
            self.share.channel().stop_waiting(&self.share);
        }
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::clone(&self.share) as Arc<dyn Settler>
    }

    async fn close(&mut self) -> Result<()> {
        self.end();
        Ok(())
    }
}

impl Drop for MemoryConsumer {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for MemoryConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MemoryConsumer").field(&self.share).finish()
    }
}
