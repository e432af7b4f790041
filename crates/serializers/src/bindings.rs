use std::any::{TypeId, type_name};
use std::collections::BTreeMap;

use crate::format::Format;
use crate::registry_error::RegistryError;

/// Which serializer a type has: by itself, or by a group its path belongs to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bindings {
    exact: BTreeMap<TypeId, Format>,
    fallbacks: Vec<Fallback>,
}

#[derive(Clone, Debug)]
struct Fallback {
    group: Box<str>,
    format: Format,
}

impl Bindings {
    pub(crate) fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.fallbacks.is_empty()
    }

    pub(crate) fn bind<T: 'static + ?Sized>(&mut self, format: Format) -> Result<(), RegistryError> {
        let bound = self.exact.entry(TypeId::of::<T>()).or_insert_with(|| format.clone());
        agree(|| format!("type `{}`", type_name::<T>()), bound, &format)
    }

    pub(crate) fn bind_fallback(&mut self, group: &str, format: Format) -> Result<(), RegistryError> {
        let trimmed = group.trim_matches(':');
        if trimmed.is_empty() || trimmed.split("::").any(|segment| !is_identifier(segment)) {
            return Err(RegistryError::Invalid {
                what: "group",
                value: group.into(),
                expected: "a run of path segments such as \"shop::orders\"",
            });
        }
        if let Some(same) = self.fallbacks.iter().find(|fallback| *fallback.group == *trimmed) {
            return agree(|| format!("group \"{trimmed}\""), &same.format, &format);
        }
        self.fallbacks.push(Fallback { group: trimmed.into(), format });
        Ok(())
    }

    /// The serializer of `T` by the first rule that covers it, if one does.
    pub(crate) fn find<T: 'static + ?Sized>(&self) -> Result<Option<&Format>, RegistryError> {
        match self.exact.get(&TypeId::of::<T>()) {
            Some(format) => Ok(Some(format)),
            None => self.find_fallback(type_name::<T>()),
        }
    }

    fn find_fallback(&self, type_name: &'static str) -> Result<Option<&Format>, RegistryError> {
        let mut best: Option<&Fallback> = None;
        let mut rival: Option<&Fallback> = None;
        for fallback in self.fallbacks.iter().filter(|fallback| fallback.matches(type_name)) {
            match best {
                Some(found) if found.segments() > fallback.segments() => {}
                Some(found) if found.segments() == fallback.segments() => {
                    if found.format != fallback.format {
                        rival = Some(fallback);
                    }
                }
                _ => (best, rival) = (Some(fallback), None),
            }
        }
        match (best, rival) {
            (Some(first), Some(second)) => {
                Err(RegistryError::Ambiguous { type_name, first: first.group.clone(), second: second.group.clone() })
            }
            (best, _) => Ok(best.map(|fallback| &fallback.format)),
        }
    }
}

impl Fallback {
    fn segments(&self) -> usize {
        self.group.split("::").count()
    }

    /// Whether the group is a run of whole segments of the path of this type, its generic arguments left out.
    fn matches(&self, type_name: &str) -> bool {
        let mut rest = type_name.trim_start_matches('&').split('<').next().unwrap_or_default();
        loop {
            if rest.strip_prefix(&*self.group).is_some_and(|after| after.is_empty() || after.starts_with("::")) {
                return true;
            }
            match rest.split_once("::") {
                Some((_, after)) => rest = after,
                None => return false,
            }
        }
    }
}

fn is_identifier(segment: &str) -> bool {
    !segment.is_empty() && segment.chars().all(|c| c.is_alphanumeric() || c == '_')
}

fn agree(target: impl Fn() -> String, bound: &Format, wanted: &Format) -> Result<(), RegistryError> {
    if bound == wanted {
        return Ok(());
    }
    Err(RegistryError::AlreadyBound {
        target: target().into(),
        bound: bound.name().into(),
        refused: wanted.name().into(),
    })
}
