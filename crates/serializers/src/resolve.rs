//! The receiving side of the registry: from the label of a message to the format that reads it.

use crate::accept::Accept;
use crate::detail::shorten;
use crate::error::DecodeError;
use crate::format::Format;
use crate::registry::{JSON, Serializers, join};
use crate::registry_error::RegistryError;

impl Serializers {
    /// Checks that an allow-list names serializers of this registry, so that a slip of the pen is found at
    /// start.
    ///
    /// # Errors
    ///
    /// [`RegistryError::UnknownName`], or [`RegistryError::Invalid`] if it decodes unlabelled bodies with a
    /// serializer that it does not accept.
    pub fn check(&self, accept: &Accept) -> Result<(), RegistryError> {
        for name in accept.names().into_iter().flatten().chain(accept.unlabelled()) {
            self.by_name(name)?;
        }
        match accept.unlabelled() {
            Some(name) if !accept.allows(name) => Err(RegistryError::Invalid {
                what: "unlabelled format",
                value: name.into(),
                expected: "one of the accepted serializers",
            }),
            _ => Ok(()),
        }
    }

    /// The serializer to decode a message with: the one its content type names, if `accept` allows it.
    ///
    /// # Errors
    ///
    /// [`DecodeError::Unlabelled`], [`DecodeError::UnknownContentType`] and [`DecodeError::NotAccepted`].
    #[inline]
    pub fn resolve(&self, accept: &Accept, content_type: Option<&str>) -> Result<&Format, DecodeError> {
        if accept.is_any() && content_type == Some("application/json") {
            return Ok(&JSON);
        }
        self.resolve_other(accept, content_type)
    }

    fn resolve_other(&self, accept: &Accept, content_type: Option<&str>) -> Result<&Format, DecodeError> {
        let label = content_type.map(str::trim).filter(|label| !label.is_empty());
        let (found, label) = match (label, accept.unlabelled()) {
            (Some(label), _) => (self.by_content_type(label), label),
            (None, Some(name)) => (self.by_name(name).ok(), name),
            (None, None) => {
                return Err(DecodeError::Unlabelled { accepted: self.accepted(accept) });
            }
        };
        let Some(format) = found else {
            let known = join(self.iter().map(Format::content_type));
            return Err(DecodeError::UnknownContentType { content_type: shorten(label), known });
        };
        if !accept.allows(format.name()) {
            return Err(DecodeError::NotAccepted {
                format: format.name().into(),
                content_type: shorten(label),
                accepted: self.accepted(accept),
            });
        }
        Ok(format)
    }

    fn accepted(&self, accept: &Accept) -> Box<str> {
        match accept.names() {
            Some(names) => join(names),
            None => join(self.names()),
        }
    }
}
