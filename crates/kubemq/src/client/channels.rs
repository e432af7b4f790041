//! Channels of every pattern: made, deleted, listed. These are queries to a channel of the server's own.

use polymq_core::Result;

use super::KubeMq;
use crate::topology::{self, ChannelInfo, Pattern};

impl KubeMq {
    /// Makes a channel; harmless when it exists.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](polymq_core::ErrorKind::Unsupported) where the server does not manage channels.
    pub async fn create_channel(&self, pattern: Pattern, name: &str) -> Result<()> {
        let live = self.link.live_soon("declare").await?;
        topology::create(&self.link, &live, pattern, name).await
    }

    /// Deletes a channel and what it holds; harmless when it does not exist.
    ///
    /// # Errors
    /// As [`create_channel`](Self::create_channel).
    pub async fn delete_channel(&self, pattern: Pattern, name: &str) -> Result<()> {
        let live = self.link.live_soon("delete").await?;
        topology::delete(&self.link, &live, pattern, name).await
    }

    /// The channels of a pattern whose names contain a text; all of them, if it is empty.
    ///
    /// # Errors
    /// As [`create_channel`](Self::create_channel).
    pub async fn list_channels(&self, pattern: Pattern, search: &str) -> Result<Vec<ChannelInfo>> {
        let live = self.link.live_soon("list").await?;
        topology::list(&self.link, &live, pattern, search).await
    }
}
