//! Signs what is sent.

use async_trait::async_trait;
use polymq_core::{Layer, Message, NextSend, Receipt, Result};

use crate::{
    SigningKey,
    signed::{self, SIGNATURE},
};

/// Signs every message that is sent over the bus, replies included.
#[derive(Debug, Clone)]
pub struct Signer(SigningKey);

impl Signer {
    /// Signs with this key.
    #[must_use]
    pub fn new(key: SigningKey) -> Self {
        Self(key)
    }
}

#[async_trait]
impl Layer for Signer {
    async fn send(&self, message: Message, next: NextSend<'_>) -> Result<Receipt> {
        let signature = self.0.sign(&signed::text(&message, &next.address().to_string()));
        let signed = message.with_header(SIGNATURE, signed::write(self.0.id(), &signature));
        next.send(signed).await
    }
}
