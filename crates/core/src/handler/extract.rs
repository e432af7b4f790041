//! Arguments of handlers, and how they are made from a delivery.

use std::{
    any::{Any, TypeId, type_name},
    collections::HashMap,
    fmt,
    ops::Deref,
    sync::Arc,
};

use bytes::Bytes;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::{Address, Bus, Details, Error, ErrorKind, Headers, Message, MessageId, Result, serializers::Format};

/// What an argument is made from: the delivery and its surroundings.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub(crate) message: &'a Message,
    pub(crate) attempt: u32,
    pub(crate) channel: &'a str,
    pub(crate) details: Option<&'a Details>,
    pub(crate) address: &'a Address,
    pub(crate) group: Option<&'a str>,
    pub(crate) subscription: u64,
    pub(crate) bus: &'a Bus,
    pub(crate) states: &'a States,
    pub(crate) accept: &'a crate::serializers::Accept,
    pub(crate) cancelled: &'a CancellationToken,
}

impl<'a> View<'a> {
    /// The message.
    #[must_use]
    pub fn message(&self) -> &'a Message {
        self.message
    }

    /// The number of this attempt, 1-based.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Decodes the body by its content type, as the channel accepts it.
    ///
    /// # Errors
    /// [`ErrorKind::Decode`]: the message goes the way of the policy for undecodable ones.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T> {
        let parts = self.bus.parts();
        let format = parts.serializers.resolve(self.accept, self.message.content_type())?;
        Ok(format.decode(self.message.payload(), &parts.limits)?)
    }
}

/// An argument of a handler. Implement it for a type of your own to have it extracted.
///
/// A type that cannot be made makes the message undecodable: it is not retried.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an argument of a handler",
    note = "arguments are the body as any type that implements serde::Deserialize, Json<T>, Body, Message, Headers, \
            Context, State<T>, Attempt or MessageId; at most one decodes the body"
)]
pub trait FromDelivery: Sized {
    /// Makes the argument.
    ///
    /// # Errors
    /// [`ErrorKind::Decode`] or another kind that says why it cannot be made.
    fn from_delivery(view: &View<'_>) -> Result<Self>;

    /// The type whose kind decides which messages the handler takes, if this argument is the body.
    #[must_use]
    fn body_type() -> Option<TypeId> {
        None
    }

    /// The type of the state that must be given before the runner starts, and its name, if this argument is one.
    #[must_use]
    fn needed_state() -> Option<(TypeId, &'static str)> {
        None
    }
}

impl<T: DeserializeOwned + 'static> FromDelivery for T {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        view.decode()
    }

    fn body_type() -> Option<TypeId> {
        Some(TypeId::of::<T>())
    }
}

/// The body as JSON, whatever content type it is labelled with, or none; [`Route::accept`](crate::Route::accept) does not apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned + 'static> FromDelivery for Json<T> {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        Ok(Self(Format::JSON.decode(view.message.payload(), &view.bus.parts().limits)?))
    }

    fn body_type() -> Option<TypeId> {
        Some(TypeId::of::<T>())
    }
}

/// The body as it came, decoded by nobody. It takes unlabelled bodies, as [`Message`], [`Context`] and [`Json`] do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Body(pub Bytes);

impl FromDelivery for Body {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        Ok(Self(view.message.payload().clone()))
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl FromDelivery for Message {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        Ok(view.message.clone())
    }
}

impl FromDelivery for Headers {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        Ok(view.message.headers().clone())
    }
}

impl FromDelivery for MessageId {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        let missing = || Error::new(ErrorKind::Decode, "the message has no id, which this handler asks for");
        view.message.id().cloned().ok_or_else(missing)
    }
}

/// The number of this attempt, 1-based.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt(pub u32);

impl FromDelivery for Attempt {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        Ok(Self(view.attempt))
    }
}

/// What [`ConsumerFactory::state`](crate::ConsumerFactory::state) was given, shared by all calls.
#[derive(Debug)]
pub struct State<T>(pub Arc<T>);

impl<T> Clone for State<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Deref for State<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Send + Sync + 'static> FromDelivery for State<T> {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        let missing = || {
            Error::new(ErrorKind::Config, format!("no state of type {} was given", type_name::<T>()))
                .with_hint("call ConsumerFactory::state before the runner starts")
        };
        view.states.get::<T>().map(Self).ok_or_else(missing)
    }

    fn needed_state() -> Option<(TypeId, &'static str)> {
        Some((TypeId::of::<T>(), type_name::<T>()))
    }
}

/// Everything about the delivery, and the bus to send with.
#[derive(Debug, Clone)]
pub struct Context {
    message: Message,
    attempt: u32,
    channel: Arc<str>,
    details: Option<Details>,
    bus: Bus,
    cancelled: CancellationToken,
}

impl Context {
    /// The message.
    #[must_use]
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// The user's headers.
    #[must_use]
    pub fn headers(&self) -> &Headers {
        self.message.headers()
    }

    /// The number of this attempt, 1-based.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The concrete name of the channel: with wildcards, the name that was sent to.
    #[must_use]
    pub fn channel(&self) -> &str {
        &self.channel
    }

    /// What the broker itself tells about the delivery.
    #[must_use]
    pub fn details(&self) -> Option<&Details> {
        self.details.as_ref()
    }

    /// The bus that the message came over.
    #[must_use]
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Whether the handler should end because the service is being stopped by force. A handler that is not done
    /// by then is dropped at its next await, and its message returns to the broker.
    #[must_use]
    pub fn cancelled(&self) -> &CancellationToken {
        &self.cancelled
    }

    /// Sends `value` to the queue where the sender waits for a reply, with the request's correlation id.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] when the message asks for no reply; then those of sending.
    pub async fn reply<T: serde::Serialize + 'static>(&self, value: &T) -> Result<()> {
        let Some(asking) = crate::request::ReplyAddress::of(&self.message) else {
            return Err(Error::new(ErrorKind::InvalidInput, "the message names no queue for a reply")
                .with_operation("reply")
                .with_hint(
                    "return Answer(value), which also answers on the exchange itself where the protocol has one",
                ));
        };
        asking.send(&self.bus, self.bus.parts().encode(value)?).await
    }
}

impl FromDelivery for Context {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        Ok(Self {
            message: view.message.clone(),
            attempt: view.attempt,
            channel: view.channel.into(),
            details: view.details.cloned(),
            bus: view.bus.clone(),
            cancelled: view.cancelled.clone(),
        })
    }
}

/// Values by type.
#[derive(Clone, Default)]
pub(crate) struct States(HashMap<TypeId, Arc<dyn Any + Send + Sync>>);

impl States {
    pub(crate) fn insert<T: Send + Sync + 'static>(&mut self, value: Arc<T>) {
        self.0.insert(TypeId::of::<T>(), value);
    }

    pub(crate) fn has(&self, id: TypeId) -> bool {
        self.0.contains_key(&id)
    }

    pub(crate) fn get<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        self.0.get(&TypeId::of::<T>()).cloned()?.downcast().ok()
    }
}

impl fmt::Debug for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} states", self.0.len())
    }
}
