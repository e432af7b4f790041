//! What a message gets before it leaves, and what is refused then.

use std::any::TypeId;

use serde::Serialize;

use super::Channel;
use crate::{Error, ErrorKind, Message, Outgoing, Result, bus::Parts, message::Stamp};

impl Channel {
    /// Gives the message what it lacks; refuses what every backend refuses, then what this one cannot carry.
    #[inline]
    pub(super) fn prepare(&self, message: &mut Message, now: impl FnOnce() -> Stamp) -> Result<()> {
        if let Some(identity) = &self.0.parts.identity {
            identity.sign(message);
        }
        message.stamp(now);
        let bytes = message.payload().len();
        let fits = self.0.parts.capabilities.max_payload.is_none_or(|max| bytes <= max);
        if fits && message.is_plain() { Ok(()) } else { self.check_message(message) }
    }

    #[inline(never)]
    fn check_message(&self, message: &Message) -> Result<()> {
        message.check().map_err(|error| self.locate(error))?;
        self.within_limits(message)
    }

    /// Prepares messages where they are; tells which are refused.
    pub(super) fn prepare_all(&self, messages: &mut Outgoing, now: &mut Stamp) -> Vec<(usize, Error)> {
        let mut refused = Vec::new();
        for (at, message) in messages.iter_mut().enumerate() {
            if let Err(error) = self.prepare(message, || now.take()) {
                refused.push((at, error));
            }
        }
        refused
    }

    pub(super) fn within_limits(&self, message: &Message) -> Result<()> {
        let capabilities = &self.0.parts.capabilities;
        let bytes = message.payload().len();
        if let Some(max) = capabilities.max_payload
            && bytes > max
        {
            return Err(self.locate(
                Error::new(ErrorKind::TooLarge, format!("a body of {bytes} bytes, at most {max} bytes are possible"))
                    .with_hint("send a reference to the data instead"),
            ));
        }
        if message.deliver_at().is_some() && !capabilities.delayed_send.support.is_available() {
            return Err(self.locate(Error::unsupported(self.backend(), "sending now what is delivered later")));
        }
        if let (Some(at), Some(max)) = (message.deliver_at(), capabilities.delayed_send.max)
            && crate::until(at) > max
        {
            return Err(self.locate(Error::unsupported(
                self.backend(),
                format_args!("a delivery {:?} from now, at most {max:?} are possible", crate::until(at)),
            )));
        }
        if let Some(max) = capabilities.max_headers
            && message.headers().len() > max
        {
            let count = message.headers().len();
            return Err(self.locate(Error::unsupported(
                self.backend(),
                format_args!("{count} headers on a message, at most {max} are possible"),
            )));
        }
        Ok(())
    }
}

impl Parts {
    pub(crate) fn encode<T: Serialize + 'static>(&self, value: &T) -> Result<Message> {
        let format = self.serializers.for_type::<T>()?;
        let body = format.encode(value, &self.limits)?;
        let message = Message::new(body).labelled(format.content_type());
        Ok(match self.kinds.get(TypeId::of::<T>()) {
            Some(kind) => {
                let message = message.with_kind(kind.name.clone());
                match kind.version {
                    Some(version) => message.with_version(version),
                    None => message,
                }
            }
            None => message,
        })
    }
}
