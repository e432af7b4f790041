//! Keys and their names.

use std::{collections::HashMap, fmt, sync::Arc};

use polymq_core::{Error, ErrorKind, Result};
use ring::{
    rand::SystemRandom,
    signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey},
};

/// The longest name of a key, in bytes.
const MAX_ID: usize = 64;

/// A key that signs, and its name. Clones are the same key.
#[derive(Clone)]
pub struct SigningKey {
    id: Arc<str>,
    pair: Arc<Ed25519KeyPair>,
}

impl SigningKey {
    /// A new key, and its secret form (PKCS #8, version 2) to be kept.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a name that no header can carry; [`ErrorKind::Other`] when the system has no
    /// random numbers.
    pub fn generate(id: impl Into<Arc<str>>) -> Result<(Self, Vec<u8>)> {
        let secret = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map_err(|_| Error::new(ErrorKind::Other, "the system gives no random numbers for a key"))?;
        Ok((Self::from_pkcs8(id, secret.as_ref())?, secret.as_ref().to_vec()))
    }

    /// A key from its secret form: PKCS #8 of an Ed25519 key, not as text (PEM).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what is no such key, and for a name that no header can carry.
    pub fn from_pkcs8(id: impl Into<Arc<str>>, secret: &[u8]) -> Result<Self> {
        let id = check_id(id.into())?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(secret).map_err(|rejected| {
            Error::new(ErrorKind::InvalidInput, format!("key {id:?} is no Ed25519 key in PKCS #8 ({rejected})"))
                .with_hint("make one with SigningKey::generate, or openssl genpkey -algorithm ed25519 -outform DER")
        })?;
        Ok(Self { id, pair: Arc::new(pair) })
    }

    /// Its name, which travels with each signature.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The public half, to be given to verifiers.
    #[must_use]
    pub fn public(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    pub(crate) fn sign(&self, text: &[u8]) -> Vec<u8> {
        self.pair.sign(text).as_ref().to_vec()
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The public keys whose signatures are believed, by name.
#[derive(Debug, Clone, Default)]
pub struct PublicKeys(HashMap<Arc<str>, [u8; 32]>);

impl PublicKeys {
    /// None: no message is believed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Believes this key too.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for what is no public key of 32 bytes or no name; [`ErrorKind::Conflict`] when the name
    /// is taken by another key.
    pub fn with(mut self, id: impl Into<Arc<str>>, public: &[u8]) -> Result<Self> {
        let id = check_id(id.into())?;
        let key = <[u8; 32]>::try_from(public).map_err(|_| {
            let sentence = format!("public key {id:?} has {} bytes, an Ed25519 key has 32", public.len());
            Error::new(ErrorKind::InvalidInput, sentence)
        })?;
        match self.0.insert(Arc::clone(&id), key) {
            Some(other) if other != key => {
                Err(Error::new(ErrorKind::Conflict, format!("two public keys have the name {id:?}"))
                    .with_hint("give each key a name of its own; a rotated key has a new one"))
            }
            _ => Ok(self),
        }
    }

    /// `None`: there is no key of this name.
    pub(crate) fn verify(&self, id: &str, text: &[u8], signature: &[u8]) -> Option<bool> {
        let key = self.0.get(id)?;
        Some(UnparsedPublicKey::new(&ED25519, key).verify(text, signature).is_ok())
    }
}

/// A name is part of a header and ends at a dot.
fn check_id(id: Arc<str>) -> Result<Arc<str>> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if id.is_empty() || id.len() > MAX_ID || !id.chars().all(plain) {
        return Err(Error::new(ErrorKind::InvalidInput, format!("{id:?} is no name of a key"))
            .with_hint("use 1 to 64 letters, digits, - and _"));
    }
    Ok(id)
}
