"""What a server's namespaces take and send, as documents: AsyncAPI, a page of it, TypeScript."""

from .asyncapi import document
from .contract import Contract, contract_of, types_of_messages
from .pages import document_routes, paths_of_documents
from .typescript import declarations

__all__ = [
    "Contract",
    "contract_of",
    "declarations",
    "document",
    "document_routes",
    "paths_of_documents",
    "types_of_messages",
]
