use std::sync::Arc;

use crate::bindings::Bindings;
use crate::content_type;
use crate::entry::SerializerEntry;
use crate::format::Format;
use crate::registry_error::RegistryError;
use crate::serializer::{FIRST_CUSTOM_ID, Serializer};
use crate::suggest;

/// JSON where a reference is asked for.
pub(crate) static JSON: Format = Format::JSON;

/// The serializers a program knows, and which of them its types use.
///
/// A value, not a global: it is set up, then cloned (cheaply) to whoever needs it. A change to one clone does
/// not reach the others.
///
/// The serializer of a type is found by the first rule that covers it: bound by [`bind`](Self::bind), in a
/// group of [`bind_fallback`](Self::bind_fallback), the default (JSON unless changed).
#[derive(Clone, Debug)]
pub struct Serializers {
    inner: Arc<Inner>,
}

#[derive(Clone, Debug)]
struct Inner {
    formats: Vec<Format>,
    bindings: Bindings,
    default: Option<Format>,
}

impl Default for Serializers {
    fn default() -> Self {
        Self::builtin()
    }
}

impl Serializers {
    /// JSON, MessagePack, text and bytes, with JSON as the default.
    pub fn builtin() -> Self {
        let formats = vec![Format::JSON, Format::MESSAGE_PACK, Format::TEXT, Format::BYTES];
        Self { inner: Arc::new(Inner { formats, bindings: Bindings::default(), default: Some(Format::JSON) }) }
    }

    /// The built-in ones and every serializer that a linked crate submitted with
    /// [`register!`](crate::register).
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add), if two linked crates contradict each other.
    pub fn linked() -> Result<Self, RegistryError> {
        let mut linked: Vec<_> = inventory::iter::<SerializerEntry>().map(SerializerEntry::make).collect();
        // The linker's order is arbitrary; an error should be the same on every run.
        linked.sort_by(|a, b| (a.id(), a.name()).cmp(&(b.id(), b.name())));
        let mut serializers = Self::builtin();
        for serializer in linked {
            serializers.add(serializer)?;
        }
        Ok(serializers)
    }

    /// Adds a third-party serializer.
    ///
    /// # Errors
    ///
    /// [`RegistryError::ReservedId`] below [`FIRST_CUSTOM_ID`], [`RegistryError::Invalid`] for a name or
    /// content type that could not be matched, [`RegistryError::Duplicate`] if its name, content type or id
    /// is taken.
    pub fn add(&mut self, serializer: Arc<dyn Serializer>) -> Result<(), RegistryError> {
        let added = Format::custom(serializer);
        let (name, content_type, id) = (added.name(), added.content_type(), added.id());
        if name.is_empty() || name.contains(char::is_whitespace) {
            let expected = "at least one character and no white space";
            return Err(RegistryError::Invalid { what: "serializer name", value: name.into(), expected });
        }
        if !content_type::is_valid(content_type) {
            let expected = "the form type/subtype";
            return Err(RegistryError::Invalid { what: "content type", value: content_type.into(), expected });
        }
        let duplicate = |what, existing: &Format| {
            Err(RegistryError::Duplicate { what, added: added.describe(), existing: existing.describe() })
        };
        for existing in &self.inner.formats {
            if existing.name() == name {
                return duplicate("name", existing);
            }
            if content_type::same(existing.content_type(), content_type) || existing.reads(content_type) {
                return duplicate("content type", existing);
            }
            if existing.id() == id && id >= FIRST_CUSTOM_ID {
                return duplicate("id", existing);
            }
        }
        if id < FIRST_CUSTOM_ID {
            return Err(RegistryError::ReservedId { name: name.into(), id });
        }
        Arc::make_mut(&mut self.inner).formats.push(added);
        Ok(())
    }

    /// Binds the type `T` to the serializer called `name`.
    ///
    /// # Errors
    ///
    /// [`RegistryError::UnknownName`], or [`RegistryError::AlreadyBound`] if `T` has another one.
    pub fn bind<T: 'static + ?Sized>(&mut self, name: &str) -> Result<(), RegistryError> {
        let format = self.by_name(name)?.clone();
        Arc::make_mut(&mut self.inner).bindings.bind::<T>(format)
    }

    /// Binds all types of a group to the serializer called `name`, where no binding of their own says
    /// otherwise.
    ///
    /// A group is a run of path segments: `orders` covers `shop::orders::Paid` and `orders::v2::Paid`, not
    /// `shop::orders_old::Paid`. Of several groups that cover a type, the one with the most segments wins.
    /// Paths are those of [`std::any::type_name`].
    ///
    /// # Errors
    ///
    /// [`RegistryError::UnknownName`], [`RegistryError::Invalid`] for a group that is no path,
    /// [`RegistryError::AlreadyBound`] if the group has another serializer.
    pub fn bind_fallback(&mut self, group: &str, name: &str) -> Result<(), RegistryError> {
        let format = self.by_name(name)?.clone();
        Arc::make_mut(&mut self.inner).bindings.bind_fallback(group, format)
    }

    /// Makes the serializer called `name` the default in place of JSON.
    ///
    /// # Errors
    ///
    /// [`RegistryError::UnknownName`].
    pub fn bind_default(&mut self, name: &str) -> Result<(), RegistryError> {
        let format = self.by_name(name)?.clone();
        Arc::make_mut(&mut self.inner).default = Some(format);
        Ok(())
    }

    /// Takes the default away: a type without a binding is then an error.
    pub fn clear_default(&mut self) {
        Arc::make_mut(&mut self.inner).default = None;
    }

    /// The serializer that the type `T` is sent with.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Ambiguous`] if two groups cover it equally, [`RegistryError::Unbound`] if nothing
    /// does and the default was cleared.
    #[inline]
    pub fn for_type<T: 'static + ?Sized>(&self) -> Result<&Format, RegistryError> {
        match &self.inner.default {
            Some(default) if self.inner.bindings.is_empty() => Ok(default),
            default => {
                let bound = self.inner.bindings.find::<T>()?.or(default.as_ref());
                bound.ok_or(RegistryError::Unbound { type_name: std::any::type_name::<T>() })
            }
        }
    }

    /// The serializer with this name.
    ///
    /// # Errors
    ///
    /// [`RegistryError::UnknownName`], which lists the known names and guesses which was meant.
    pub fn by_name(&self, name: &str) -> Result<&Format, RegistryError> {
        self.inner.formats.iter().find(|format| format.name() == name).ok_or_else(|| RegistryError::UnknownName {
            name: name.into(),
            known: join(self.names()),
            guess: suggest::nearest(name, self.names()).map(Into::into),
        })
    }

    /// The serializer that reads bodies labelled `content_type`, if there is one.
    ///
    /// Parameters and case are ignored, except that `text/plain` must be UTF-8. `application/*+json` is JSON
    /// unless a serializer has that content type itself.
    pub fn by_content_type(&self, content_type: &str) -> Option<&Format> {
        let formats = &self.inner.formats;
        // The sender is usually polymq too: its spelling needs no parsing.
        let verbatim = formats.iter().find(|format| format.content_type() == content_type);
        verbatim
            .or_else(|| formats.iter().find(|format| format.reads(content_type)))
            .or_else(|| content_type::has_json_suffix(content_type).then_some(&JSON))
    }

    /// The serializer with this wire id, if there is one.
    pub fn by_id(&self, id: u16) -> Option<&Format> {
        self.inner.formats.iter().find(|format| format.id() == id)
    }

    /// The names of all serializers: built-in ones first, then in the order they were added.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.iter().map(Format::name)
    }

    /// All serializers, in the order of [`names`](Self::names).
    pub fn iter(&self) -> impl Iterator<Item = &Format> {
        self.inner.formats.iter()
    }
}

/// The parts as a list for a sentence.
pub(crate) fn join<'a>(parts: impl Iterator<Item = &'a str>) -> Box<str> {
    let joined = parts.collect::<Vec<_>>().join(", ");
    if joined.is_empty() { "none".into() } else { joined.into() }
}
