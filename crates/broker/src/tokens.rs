//! Who calls: JSON web tokens, checked with a key from a file.
//!
//! The nine algorithms of KubeMQ. `jsonwebtoken` has no ES512, so the signature is checked with `ring` and, for that
//! one, with `p521`; which algorithm is meant is configured and never taken from the token.

use std::{
    fmt,
    path::Path,
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use p521::{
    ecdsa::signature::Verifier as _,
    pkcs8::{
        DecodePublicKey as _, ObjectIdentifier,
        spki::{SubjectPublicKeyInfoRef, der::Decode as _},
    },
};
use ring::{hmac, signature};
use rustls_pki_types::{SubjectPublicKeyInfoDer, pem::PemObject as _};
use serde::Deserialize;

use crate::error::{BrokerError, Result};

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
/// Longer tokens are refused unread.
const LONGEST: usize = 8 << 10;
/// Seconds by which the clocks of who makes and who checks a token may differ.
const LEEWAY: f64 = 30.0;

/// How tokens are signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names of RFC 7518
pub enum TokenAlgorithm {
    HS256,
    HS384,
    HS512,
    RS256,
    RS384,
    RS512,
    ES256,
    ES384,
    ES512,
}

impl fmt::Display for TokenAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl FromStr for TokenAlgorithm {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        use TokenAlgorithm::{ES256, ES384, ES512, HS256, HS384, HS512, RS256, RS384, RS512};
        let all = [HS256, HS384, HS512, RS256, RS384, RS512, ES256, ES384, ES512];
        all.into_iter().find(|known| known.to_string().eq_ignore_ascii_case(name)).ok_or_else(|| {
            format!("unknown token algorithm {name:?}: expected HS256, HS384, HS512, RS256, RS384, RS512, ES256, ES384 or ES512")
        })
    }
}

/// What a token says that matters here.
#[derive(Debug, Deserialize)]
pub(crate) struct Claims {
    #[serde(rename = "ClientID")]
    pub(crate) client_id: Option<String>,
    exp: Option<f64>,
    nbf: Option<f64>,
}

enum Key {
    Secret(hmac::Key),
    Public(signature::UnparsedPublicKey<Vec<u8>>),
    P521(p521::ecdsa::VerifyingKey),
}

/// The key that tokens are checked with.
pub(crate) struct TokenKey {
    algorithm: TokenAlgorithm,
    key: Key,
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKey").field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

impl TokenKey {
    /// Reads a key: for HS… the secret as it is, without the line's end; for RS… and ES… a public key as PEM.
    pub(crate) fn read(algorithm: TokenAlgorithm, file: &Path) -> Result<Self> {
        let wrong = |what: String| BrokerError::Option { file: file.to_owned(), what };
        let content = std::fs::read(file).map_err(|cause| wrong(format!("the token key cannot be read: {cause}")))?;
        let key = match algorithm {
            TokenAlgorithm::HS256 => secret(hmac::HMAC_SHA256, &content),
            TokenAlgorithm::HS384 => secret(hmac::HMAC_SHA384, &content),
            TokenAlgorithm::HS512 => secret(hmac::HMAC_SHA512, &content),
            _ => public(algorithm, &content),
        };
        key.map(|key| Self { algorithm, key }).map_err(wrong)
    }

    /// What a token says, when it is signed with the key and its time is now; else why it is refused.
    pub(crate) fn verify(&self, token: &str) -> std::result::Result<Claims, &'static str> {
        if token.len() > LONGEST {
            return Err("token is too long");
        }
        const MALFORMED: &str = "token is malformed";
        let (signed, mac) = token.rsplit_once('.').ok_or(MALFORMED)?;
        let (header, claims) = signed.split_once('.').ok_or(MALFORMED)?;
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| MALFORMED);
        let mac = decode(mac)?;
        let header: Header = serde_json::from_slice(&decode(header)?).map_err(|_| MALFORMED)?;
        if header.alg != self.algorithm.to_string() || header.crit.is_some() {
            return Err("token is signed in another way than this server expects");
        }
        let genuine = match &self.key {
            Key::Secret(key) => hmac::verify(key, signed.as_bytes(), &mac).is_ok(),
            Key::Public(key) => key.verify(signed.as_bytes(), &mac).is_ok(),
            Key::P521(key) => p521::ecdsa::Signature::from_slice(&mac)
                .is_ok_and(|signature| key.verify(signed.as_bytes(), &signature).is_ok()),
        };
        if !genuine {
            return Err("signature is invalid");
        }
        let claims: Claims = serde_json::from_slice(&decode(claims)?).map_err(|_| "token has malformed claims")?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        if claims.exp.is_some_and(|until| until + LEEWAY <= now) {
            return Err("token is expired");
        }
        if claims.nbf.is_some_and(|from| from - LEEWAY > now) {
            return Err("token is not valid yet");
        }
        Ok(claims)
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    /// Extensions that must be understood; none is.
    crit: Option<serde::de::IgnoredAny>,
}

fn secret(algorithm: hmac::Algorithm, content: &[u8]) -> std::result::Result<Key, String> {
    let secret = content.strip_suffix(b"\n").unwrap_or(content);
    let secret = secret.strip_suffix(b"\r").unwrap_or(secret);
    if secret.is_empty() {
        return Err("the token key is empty: write the secret that tokens are signed with into the file".to_owned());
    }
    Ok(Key::Secret(hmac::Key::new(algorithm, secret)))
}

fn public(algorithm: TokenAlgorithm, content: &[u8]) -> std::result::Result<Key, String> {
    let expected = |found: &str| format!("{algorithm} needs {}, found {found}", wanted(algorithm));
    let info = SubjectPublicKeyInfoDer::from_pem_slice(content)
        .map_err(|_| expected("none: the file must hold a public key as PEM (BEGIN PUBLIC KEY)"))?;
    let unreadable = || expected("one that cannot be read");
    let parsed = SubjectPublicKeyInfoRef::from_der(info.as_ref()).map_err(|_| unreadable())?;
    let curve = parsed.algorithm.parameters.and_then(|curve| curve.decode_as::<ObjectIdentifier>().ok());
    let way: &'static dyn signature::VerificationAlgorithm = match (algorithm, parsed.algorithm.oid, curve) {
        (TokenAlgorithm::RS256, RSA, _) => &signature::RSA_PKCS1_2048_8192_SHA256,
        (TokenAlgorithm::RS384, RSA, _) => &signature::RSA_PKCS1_2048_8192_SHA384,
        (TokenAlgorithm::RS512, RSA, _) => &signature::RSA_PKCS1_2048_8192_SHA512,
        (TokenAlgorithm::ES256, EC, Some(P256)) => &signature::ECDSA_P256_SHA256_FIXED,
        (TokenAlgorithm::ES384, EC, Some(P384)) => &signature::ECDSA_P384_SHA384_FIXED,
        (TokenAlgorithm::ES512, EC, _) => {
            let key = p521::ecdsa::VerifyingKey::from_public_key_der(info.as_ref());
            return key.map(Key::P521).map_err(|_| expected("a key of another curve"));
        }
        (_, RSA, _) => return Err(expected("an RSA key")),
        (_, EC, _) => return Err(expected("a key of another curve")),
        _ => return Err(expected("a key of another kind")),
    };
    let key = parsed.subject_public_key.as_bytes().ok_or_else(unreadable)?;
    Ok(Key::Public(signature::UnparsedPublicKey::new(way, key.to_vec())))
}

fn wanted(algorithm: TokenAlgorithm) -> &'static str {
    match algorithm {
        TokenAlgorithm::ES256 => "a public key of the curve P-256",
        TokenAlgorithm::ES384 => "a public key of the curve P-384",
        TokenAlgorithm::ES512 => "a public key of the curve P-521",
        _ => "an RSA public key of 2048 bits or more",
    }
}
