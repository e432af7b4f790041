//! What can be asked of a channel beside its messages: to exist, to be counted, emptied, bound and looked into.
//!
//! Each operation is declared by a capability; one that the backend lacks is
//! [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported), never a pretended success.

use crate::{Bus, Channel, ConsumeOptions, Error, Listed, Message, Result, Stats, subscription};

impl Channel {
    /// Makes sure that the channel, the group's share of it and its dead-letter queue exist. Harmless when they do.
    ///
    /// # Errors
    /// As the broker answers; [`ErrorKind::Conflict`](crate::ErrorKind::Conflict) when it exists with other properties.
    pub async fn declare(&self, mut options: ConsumeOptions) -> Result<()> {
        self.check()?;
        options.dead_letters = self.letters_of(&options);
        let capabilities = self.connection().capabilities();
        let located = |error: Error| self.locate(error.with_operation("declare"));
        subscription::check_options(self.backend(), capabilities, self.address(), &options).map_err(located)?;
        self.connection().declare(self.address(), &options).await.map_err(located)
    }

    /// Whether the channel, or the group's share of a topic, exists. Nothing is created.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) as declared (`lookup`). Credentials that are refused are
    /// an error, not a "no".
    pub async fn exists(&self, group: Option<&str>) -> Result<bool> {
        self.check()?;
        self.check_group(group)?;
        let found = self.connection().exists(self.address(), group).await;
        found.map_err(|error| self.locate(error.with_operation("exists")))
    }

    /// Deletes the channel, or one group's share of a topic.
    ///
    /// # Errors
    /// As the broker answers; a channel that does not exist is no error.
    pub async fn delete(&self, group: Option<&str>) -> Result<()> {
        self.check()?;
        self.check_group(group)?;
        let deleted = self.connection().delete(self.address(), group).await;
        deleted.map_err(|error| self.locate(error.with_operation("delete")))
    }

    /// Counts messages and consumers.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) as declared (`stats`),
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
    pub async fn stats(&self, group: Option<&str>) -> Result<Stats> {
        self.check()?;
        self.check_group(group)?;
        let counted = self.connection().stats(self.address(), group).await;
        counted.map_err(|error| self.locate(error.with_operation("stats")))
    }

    /// Empties the queue and says how many messages are gone. What is delivered and not settled stays.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) as declared (`purge`),
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
    pub async fn purge(&self) -> Result<u64> {
        self.check()?;
        self.connection().purge(self.address()).await.map_err(|error| self.locate(error.with_operation("purge")))
    }

    /// Up to `max` of the messages that wait, oldest first, without taking them.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) as declared (`peek`),
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
    pub async fn peek(&self, group: Option<&str>, max: usize) -> Result<Vec<Message>> {
        self.check()?;
        self.check_group(group)?;
        let seen = self.connection().peek(self.address(), group, max).await;
        seen.map_err(|error| self.locate(error.with_operation("peek")))
    }

    /// This queue gets the messages of that topic too, from now on and beside all others that it gets: binding one
    /// topic leaves earlier bindings as they are. Both exist afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) as declared (`bindings`),
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) unless this is a queue and that a topic.
    pub async fn bind(&self, topic: &Self) -> Result<()> {
        self.check_binding(topic)?;
        let bound = self.connection().bind(self.address(), topic.address()).await;
        bound.map_err(|error| self.locate(error.with_operation("bind")))
    }

    /// Ends a binding; messages that the queue has already stay. Harmless when there was none.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub async fn unbind(&self, topic: &Self) -> Result<()> {
        self.check_binding(topic)?;
        let unbound = self.connection().unbind(self.address(), topic.address()).await;
        unbound.map_err(|error| self.locate(error.with_operation("unbind")))
    }

    fn check_binding(&self, topic: &Self) -> Result<()> {
        use crate::{ChannelKind, ErrorKind};
        self.check()?;
        topic.check()?;
        if (self.address().kind(), topic.address().kind()) == (ChannelKind::Queue, ChannelKind::Topic) {
            return Ok(());
        }
        let sentence = format!("{} cannot be bound to {}", self.address(), topic.address());
        Err(self.locate(
            Error::new(ErrorKind::InvalidInput, sentence).with_operation("bind").with_hint("bind a queue to a topic"),
        ))
    }
}

impl Bus {
    /// The channels that the broker has, with their counts where the backend counts. Under a
    /// [prefix](crate::BusBuilder::prefix), only those that have it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) as declared (`list`).
    pub async fn list(&self) -> Result<Vec<Listed>> {
        let listed = self.connection().list().await;
        let mut listed = listed.map_err(|error| error.with_backend(self.backend()).with_operation("list"))?;
        listed.sort_by(|one, other| (&one.address, &one.group).cmp(&(&other.address, &other.group)));
        Ok(listed)
    }
}
