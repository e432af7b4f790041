//! Giving a message its attributes.

use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::{Message, MessageId, Stamp, content_type::Known};
use crate::{
    Headers, clock,
    headers::{SYSTEM_PREFIX, Text},
};

/// The last second of the year 9999, since 1970.
const LAST_EXPIRY: Duration = Duration::from_secs(253_402_300_799);

impl Message {
    /// Sets the id; without it, sending gives a UUIDv7.
    #[must_use]
    pub fn with_id(mut self, id: impl Into<MessageId>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// Replaces the body.
    #[must_use]
    pub fn with_payload(mut self, payload: impl Into<Bytes>) -> Self {
        self.payload = payload.into();
        self
    }

    /// Sets the media type of the body.
    #[must_use]
    pub fn with_content_type(mut self, content_type: impl Into<Text>) -> Self {
        match content_type.into() {
            // A program has so many literals and no more; a text may have come from anywhere.
            Text::Borrowed(literal) => return self.labelled(literal),
            Text::Owned(text) => {
                self.content_type = Known::find(&text);
                if self.content_type.is_none() {
                    self.rest_mut().content_type = Some(text.into());
                }
            }
        }
        self
    }

    /// Sets a content type that the program itself has named.
    #[inline]
    pub(crate) fn labelled(mut self, content_type: &str) -> Self {
        self.content_type = Known::remember(content_type);
        if self.content_type.is_none() {
            self.rest_mut().content_type = Some(content_type.to_owned().into());
        }
        self
    }

    /// Sets the logical type name.
    #[must_use]
    pub fn with_kind(mut self, kind: impl Into<Text>) -> Self {
        self.kind = Some(kind.into());
        self
    }

    /// Sets the schema version of the kind.
    #[must_use]
    pub fn with_version(mut self, version: u32) -> Self {
        (self.has_version, self.version) = (true, version);
        self
    }

    /// Sets when the message was made; without it, sending sets the present time. Times from 1970 to 2554 can be
    /// told, to the nanosecond; any other becomes none.
    #[must_use]
    pub fn with_time(mut self, time: SystemTime) -> Self {
        self.time = Stamp::from(time).nanos();
        self
    }

    /// Sets the ordering and partition key.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<Text>) -> Self {
        self.rest_mut().key = Some(key.into());
        self
    }

    /// Sets the correlation id.
    #[must_use]
    pub fn with_correlation_id(mut self, id: impl Into<Text>) -> Self {
        self.rest_mut().correlation_id = Some(id.into());
        self
    }

    /// Sets the queue where a reply is awaited.
    #[must_use]
    pub fn with_reply_to(mut self, queue: impl Into<Text>) -> Self {
        self.rest_mut().reply_to = Some(queue.into());
        self
    }

    /// From `at` on the message is not handled any more; the year 9999 is as late as it gets, since the text that carries
    /// this time knows no later one.
    #[must_use]
    pub fn with_expires_at(mut self, at: SystemTime) -> Self {
        self.rest_mut().expires_at = Some(at.min(SystemTime::UNIX_EPOCH + LAST_EXPIRY));
        self
    }

    /// The message is not handled later than `ttl` from now, and no later than 30 years from now.
    #[must_use]
    pub fn expires_in(self, ttl: Duration) -> Self {
        self.with_expires_at(clock::wall_in(ttl))
    }

    /// The message is not delivered before `at`; a backend without delay refuses to send it.
    #[must_use]
    pub fn with_deliver_at(mut self, at: SystemTime) -> Self {
        self.rest_mut().deliver_at = Some(at);
        self
    }

    /// The message is not delivered before `delay` from now; more than 30 years count as 30.
    #[must_use]
    pub fn deliver_in(self, delay: Duration) -> Self {
        self.with_deliver_at(clock::wall_in(delay))
    }

    /// Takes the delivery time away, as a backend does that has kept it.
    #[must_use]
    pub fn without_deliver_at(mut self) -> Self {
        if let Some(rest) = &mut self.rest {
            rest.deliver_at = None;
        }
        self
    }

    /// Takes the expiry away.
    #[must_use]
    pub fn without_expires_at(mut self) -> Self {
        if let Some(rest) = &mut self.rest {
            rest.expires_at = None;
        }
        self
    }

    /// Sets one header; the rules of [`Headers::check`] are applied when the message is sent.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<Text>, value: impl Into<Text>) -> Self {
        self.rest_mut().headers.insert(name, value);
        self
    }

    /// Replaces the headers.
    #[must_use]
    pub fn with_headers(mut self, headers: Headers) -> Self {
        if !headers.is_empty() || self.rest.is_some() {
            self.rest_mut().headers = headers;
        }
        self
    }

    /// Adds a header as a backend read it, to the user's or to the system's by its name.
    pub fn add_wire_header(&mut self, name: impl Into<Text>, value: impl Into<Text>) {
        let name = name.into();
        let rest = self.rest_mut();
        if name.starts_with(SYSTEM_PREFIX) { rest.system.insert(name, value) } else { rest.headers.insert(name, value) }
    }

    /// Sets one of polymq's own headers. For backends and layers.
    pub fn set_system_header(&mut self, name: &'static str, value: impl Into<Text>) {
        debug_assert!(name.starts_with(SYSTEM_PREFIX));
        self.rest_mut().system.insert(name, value);
    }

    /// Removes polymq's own headers, so that the message starts afresh.
    pub fn clear_system_headers(&mut self) {
        if let Some(rest) = &mut self.rest {
            rest.system = Headers::new();
        }
    }
}
