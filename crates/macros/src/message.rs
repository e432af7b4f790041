//! `#[derive(Message)]`: submits the type's kind.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{DeriveInput, Error, Result, parse::ParseStream};

use crate::options::{Options, Problems};

const KNOWN: &[&str] = &["kind", "version", "queue", "topic", "crate"];

pub(crate) fn expand(item: TokenStream) -> TokenStream {
    syn::parse2(item).and_then(|input| submit(&input)).unwrap_or_else(|error| error.to_compile_error())
}

fn submit(input: &DeriveInput) -> Result<TokenStream> {
    let mut problems = Problems::default();
    if !input.generics.params.is_empty() {
        problems.at(&input.generics, "a generic type has no kind of its own: bind each concrete type with Kinds::bind");
    }
    let mut attributes = input.attrs.iter().filter(|attribute| attribute.path().is_ident("message"));
    let read = |input: ParseStream<'_>| Options::parse(input, KNOWN, &[]);
    let options = match attributes.next() {
        Some(attribute) => attribute.parse_args_with(read),
        None => syn::parse::Parser::parse2(read, TokenStream::new()),
    };
    if let Some(second) = attributes.next() {
        problems.at(second, "write one #[message(...)] with everything in it");
    }
    let parts = problems.take(options).and_then(|options| {
        let krate = problems.take(options.krate());
        let kind = problems.take(options.text("kind", "order.created").map(Option::<&_>::cloned));
        let version = problems.take(options.number("version", "2").map(Option::<&_>::cloned));
        let queue = problems.take(options.text("queue", "orders").map(Option::<&_>::cloned));
        let topic = problems.take(options.text("topic", "orders").map(Option::<&_>::cloned));
        if let (Some(Some(_)), Some(Some(topic))) = (&queue, &topic) {
            problems.at(topic, "its messages travel over a queue or over a topic: keep one of them");
        }
        Some((krate?, kind?, version?, queue?, topic?))
    });
    problems.into_result()?;
    let Some((krate, kind, version, queue, topic)) = parts else { return Ok(TokenStream::new()) };
    let ty = &input.ident;
    let kind = match kind {
        Some(kind) => quote!(#kind),
        None => {
            let kind = default_kind(&ty.to_string());
            if kind.is_empty() {
                return Err(Error::new(ty.span(), "name the kind: #[message(kind = \"order.created\")]"));
            }
            quote!(#kind)
        }
    };
    let version = match version {
        Some(version) => quote!(::core::option::Option::Some(#version)),
        None => quote!(::core::option::Option::None),
    };
    let channel = match (queue, topic) {
        (Some(name), _) => quote!(::core::option::Option::Some((#krate::ChannelKind::Queue, #name))),
        (None, Some(name)) => quote!(::core::option::Option::Some((#krate::ChannelKind::Topic, #name))),
        (None, None) => quote!(::core::option::Option::None),
    };
    Ok(quote! {
        const _: () = {
            #krate::__private::inventory::submit! {
                #krate::KindEntry {
                    type_id: ::core::any::TypeId::of::<#ty>,
                    type_name: ::core::any::type_name::<#ty>,
                    name: #kind,
                    version: #version,
                    channel: #channel,
                }
            }
        };
    })
}

/// `OrderCreated` is `order.created`, `HTTPRequest` is `http.request`.
fn default_kind(name: &str) -> String {
    let name = name.trim_start_matches("r#");
    let letters: Vec<char> = name.chars().collect();
    let mut kind = String::with_capacity(name.len() + 4);
    for (at, letter) in letters.iter().enumerate() {
        let after_small = at > 0 && !letters[at - 1].is_uppercase();
        let before_small = letters.get(at + 1).is_some_and(|next| next.is_lowercase());
        let starts_word = *letter == '_' || letter.is_uppercase() && at > 0 && (after_small || before_small);
        if starts_word && !kind.is_empty() && !kind.ends_with('.') {
            kind.push('.');
        }
        if *letter != '_' {
            kind.extend(letter.to_lowercase());
        }
    }
    kind.trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_from_type_names() {
        for (name, kind) in [
            ("Order", "order"),
            ("OrderCreated", "order.created"),
            ("HTTPRequest", "http.request"),
            ("OrderV2", "order.v2"),
            ("Snake_Case", "snake.case"),
            ("r#Type", "type"),
        ] {
            assert_eq!(default_kind(name), kind, "{name}");
        }
    }

    #[test]
    fn submits_one_entry() {
        let tokens = expand(quote! { #[message(version = 2, crate = mq)] struct OrderCreated; }).to_string();
        for part in ["mq :: KindEntry", "\"order.created\"", "Some (2)", "TypeId :: of :: < OrderCreated >"] {
            assert!(tokens.contains(part), "{part} is missing: {tokens}");
        }
        assert!(!tokens.contains("polymq"), "{tokens}");
    }
}
