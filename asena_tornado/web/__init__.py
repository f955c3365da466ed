"""Plain HTTP on Tornado: requests and responses, middleware, controllers."""
